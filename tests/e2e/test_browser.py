"""A person watches in Chromium while an unmodified client trains: the points arrive by themselves, all of them."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import ROOT, TINKER038
from tests.up.instances import Instance, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
NUM_STEPS = 120


def test_points_arrive_while_a_loop_runs(page: Page, product: Instance, sdk_env: dict[str, str]) -> None:
    num_runs = page.locator("tbody tr").count()
    loop = subprocess.Popen(
        [str(TINKER038.python), str(ROOT / "examples" / "sft_loop.py")],
        env={**os.environ, **sdk_env, "SFT_STEPS": str(NUM_STEPS)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        expect(page.locator("tbody tr")).to_have_count(num_runs + 1)  # the list is live
        loop.send_signal(signal.SIGSTOP)  # or it may be over before a busy machine has opened the page
        page.locator("tbody tr a").first.click()
        page.wait_for_url("**/runs/**:train:*/")
        loss = page.locator("figure.chart").filter(has_text="Loss per token").locator(".chart-summary")
        expect(page.get_by_role("status").filter(has_text="Live")).to_be_visible()
        loop.send_signal(signal.SIGCONT)
        expect(loss).to_contain_text("lowest")
        seen: set[str] = set()

        def has_moved_on() -> bool:
            seen.add(page.locator(".headline div").filter(has_text="Step").locator("dd").inner_text())
            return len(seen) > 5

        wait_for(has_moved_on, 120)
        assert loop.wait(240) == 0
    finally:
        loop.kill()
        loop.communicate()

    expect(page.get_by_text("Arr!").first).to_be_visible()  # the sample after training
    values = _values(page)
    assert sorted(values) == list(range(1, NUM_STEPS + 1))
    page.reload()
    expect(loss).to_contain_text("lowest")
    assert _values(page) == values


def _values(page: Page) -> dict[int, float]:
    """Return step -> loss from the chart's table; none twice."""
    figure = page.locator("figure.chart").filter(has_text="Loss per token")
    figure.get_by_role("button", name="Table").click()
    rows = figure.locator(".chart-table tbody tr")
    expect(rows).to_have_count(NUM_STEPS)
    cells = [row.split("\t") for row in rows.all_inner_texts()]
    return {int(cell[0].replace("\u202f", "").replace(" ", "")): float(cell[1]) for cell in cells}
