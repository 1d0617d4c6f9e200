"""Pages that are left open while the web process hears nothing from Redis, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.conf import settings
from django.utils import timezone
from playwright.sync_api import Page, WebSocket, expect
from tokenizers import Tokenizer

from runs.models import RunEvent, TrainingRun, User
from tests.e2e.disturbed import to_socket
from tests.e2e.proxy import Proxy
from tests.pages import seed
from tests.pages.live.browser import LIVE
from tests.pages.live.run_page import add_steps, expect_live, expect_values, note, open_run
from tests.pages.live.server import Server

pytestmark = LIVE
STAYS = timezone.now() + timedelta(days=1)


@pytest.fixture
def redis() -> Iterator[Proxy]:
    """Return what stands between the web process and Redis; the test itself reaches it directly."""
    with Proxy(to_socket(Path(urlsplit(settings.REDIS_URL).path))) as proxy:
        yield proxy


@pytest.fixture
def server(transactional_db: None, redis: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Return the web process of this test, which has its Redis behind the proxy."""
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{redis.port}/0")
    server = Server(fresh=True)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def run(alice: User) -> TrainingRun:
    """Return a run whose head says nothing of times that would change by themselves."""
    long_ago = timezone.now() - timedelta(days=9)
    run = seed.make_run(alice, name="left open", worker=seed.make_worker(), created_at=long_ago)
    seed.add_values(run, seed.curve(60), ends_at=STAYS)
    return run


class Watched:
    """What goes between a page and the server."""

    def __init__(self, tab: Page) -> None:
        self.frames: list[dict[str, Any]] = []
        self.num_panels = 0
        self._tab = tab
        tab.on("websocket", self._listen)
        tab.on("request", lambda request: self._count(request.url))

    def wait(self, is_it: Callable[[dict[str, Any]], bool]) -> None:
        """Wait for the next message like this from the server."""
        first = len(self.frames)
        while not any(is_it(frame) for frame in self.frames[first:]):
            self._tab.wait_for_timeout(50)

    def _listen(self, socket: WebSocket) -> None:
        socket.on("framereceived", lambda text: self.frames.append(json.loads(text)))

    def _count(self, url: str) -> None:
        self.num_panels += "/panels/" in url


def is_look(frame: dict[str, Any]) -> bool:
    return "version" in frame


@pytest.mark.parametrize("ends", ["swallowed", "cut"])
def test_a_run_left_open_without_redis_keeps_up_and_is_pushed_to_afterwards(
    tab: Page, redis: Proxy, run: TrainingRun, tokenizer: Tokenizer, ends: str
) -> None:
    watched = Watched(tab)
    open_run(tab, run)
    expect_live(tab)
    listed = tab.get_by_role("region", name="Events")
    note(run, "saved", 20, checkpoint="heard-of")
    expect(listed).to_contain_text("heard-of")
    with redis.swallowing():
        note(run, "saved", 30, checkpoint="not-heard-of")
        expect(listed).to_contain_text("not-heard-of")
        seed.add_checkpoint(run, "kept-meanwhile")
        expect(tab.get_by_role("region", name="Checkpoints")).to_contain_text("kept-meanwhile")
        seed.add_sample(run, seed.chat(tokenizer, "Who is there?"), [tokenizer.encode("A bear.").ids])
        expect(tab.get_by_role("region", name="Latest samples")).to_contain_text("A bear.")
        add_steps(run, range(61, 64), ends_at=STAYS)
        expect_values(tab, run)
        if ends == "cut":
            redis.cut()
    watched.wait(is_look)
    before = len(watched.frames)
    note(run, "saved", 40, checkpoint="heard-of-again")
    expect(listed).to_contain_text("heard-of-again")
    add_steps(run, range(64, 67), ends_at=STAYS)
    expect_values(tab, run)
    if ends == "swallowed":  # the layer comes back by itself to a connection that was cut, but after a while
        assert any(frame["changed"] for frame in watched.frames[before:])
    assert listed.locator(".event").count() == RunEvent.objects.filter(run=run).count()
    watched.wait(is_look)
    num_panels = watched.num_panels
    for _ in range(2):
        watched.wait(is_look)
    assert watched.num_panels == num_panels  # nothing changed, so nothing is read


def test_a_list_left_open_without_redis_keeps_up(
    tab: Page, redis: Proxy, alice: User, run: TrainingRun
) -> None:
    tab.goto("/runs/")
    expect(tab.locator("[data-live-state]")).to_have_text("Live")
    with redis.swallowing():
        add_steps(run, range(61, 64), ends_at=STAYS)
        row = tab.locator(f'[data-run="{run.public_id}"]')
        expect(row.locator(".cell-step")).to_have_text("63")
        new = seed.make_run(alice, name="begun meanwhile")
        expect(tab.locator(f'[data-run="{new.public_id}"]')).to_contain_text("begun meanwhile")
    add_steps(run, range(64, 67), ends_at=STAYS)
    expect(row.locator(".cell-step")).to_have_text("66")
    expect(tab.locator("[data-run]")).to_have_count(2)
