"""A worker is lost: pages, REST, health and the user's own terminal say so, and later that nothing was lost."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import MINT022, TINKER038, Sdk
from tests.up.instances import Instance, is_quiet, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(700)]
LOOP = Path(__file__).with_name("waiting_loop.py")
NO_WORKER = "no GPU worker is running"
SOON_S = 15
BUSY_S = 90
MARK = re.compile(r"recovered, nothing lost at step \d+: replayed \d+ operations?; back after \d+\.\d s")


class Loop:
    """One client process that trains, and what it has written to its terminal so far."""

    def __init__(self, sdk: Sdk, env: dict[str, str], stop_file: Path) -> None:
        self._stop_file = stop_file
        self.process = subprocess.Popen(
            [str(sdk.python), str(LOOP)],
            env={**os.environ, **env, "STOP_FILE": str(stop_file)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.terminal: list[str] = []
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,))
        self._reader.start()
        self.run_id = self.process.stdout.readline().strip()

    def _read(self, stream: IO[str]) -> None:
        self.terminal += stream

    def end(self) -> int:
        """Tell it to end and return its exit code."""
        self._stop_file.touch()
        return self.process.wait(120)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.communicate()
        self._reader.join()


@contextlib.contextmanager
def frozen(product: Instance) -> Iterator[None]:
    """Freeze the worker, as when its virtual machine is paused."""
    pids = product.processes("queues=gpu")
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def killed(product: Instance) -> Iterator[None]:
    """Kill the worker while nobody can start another one."""
    (keeper,) = product.processes("supervisor.supervisord")
    os.kill(keeper, signal.SIGSTOP)
    try:
        for pid in product.processes("queues=gpu"):
            os.kill(pid, signal.SIGKILL)
        yield
    finally:
        os.kill(keeper, signal.SIGCONT)


# A frozen one that nobody replaced goes on as if nothing had happened when it wakes.
@pytest.mark.parametrize(("lose", "recovers"), [(frozen, False), (killed, True)])
def test_everything_says_that_the_worker_is_lost_and_then_that_nothing_else_is(
    lose: Callable[[Instance], contextlib.AbstractContextManager[None]],
    recovers: bool,
    page: Page,
    product: Instance,
    sdk_env: dict[str, str],
    tmp_path: Path,
) -> None:
    key = {"Authorization": f"Bearer {sdk_env['TINKER_API_KEY']}"}
    loops = [Loop(sdk, sdk_env, tmp_path / "stop") for sdk in (MINT022, TINKER038)]
    try:
        watched = loops[0]
        run_list = page.context.new_page()
        run_list.goto("/runs/")
        row = run_list.locator(f'tr[data-run="{watched.run_id}"] .status')
        expect(row).to_have_text("running")
        page.goto(f"/runs/{watched.run_id}/")
        status = page.locator(".headline-status .status")
        expect(status).to_have_text("running")
        with lose(product):
            lost_at = time.monotonic()
            expect(status).to_have_text("waiting for worker")
            expect(row).to_have_text("waiting for worker")
            told = httpx.get(
                f"{product.address}/rest/v1/runs/{watched.run_id}", headers=key, timeout=60
            ).json()
            assert told["state"] == "waiting_for_worker"
            assert httpx.get(f"{product.address}/health/ready", timeout=60).status_code == 503
            assert time.monotonic() - lost_at < (SOON_S + 1 if is_quiet() else BUSY_S)
            expect(page.locator(".facts .reason")).to_contain_text(NO_WORKER)
            for loop in loops:
                wait_for(lambda loop=loop: any(NO_WORKER in line for line in loop.terminal), 180)  # type: ignore[misc]
        expect(status).to_have_text("running", timeout=180_000)
        if recovers:
            event = page.locator(".event").filter(has_text="recovered, nothing lost").first
            expect(event).to_contain_text("replayed")
            expect(event).to_contain_text("back after")
            mark = page.locator('.lane-mark[data-kind="recovered"]').first
            expect(mark).to_have_attribute("aria-label", MARK)
            page.screenshot(path=tmp_path / "recovered.png", full_page=True)
        assert [loop.end() for loop in loops] == [0, 0]
    finally:
        for loop in loops:
            loop.kill()
    assert httpx.get(f"{product.address}/health/ready", timeout=60).status_code == 200
