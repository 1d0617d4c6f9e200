"""Charts of runs that are too long to hold every value: in buckets, finer where somebody looks closely."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, expect

from runs.models import TrainingRun, User
from tests.pages import seed
from tests.pages.live.browser import LIVE, module_address
from tests.pages.live.run_page import expect_values, open_run, shown_steps, steps

pytestmark = LIVE
# With two metrics each just below and above what a page holds one by one.
FEW, MANY = 29_990, 30_100


def make_long_run(alice: User, num_steps: int) -> TrainingRun:
    run = seed.make_run(alice)
    seed.add_values(
        run, [(step, step, {"loss": 2 / step, "tokens": 64.0}) for step in range(1, num_steps + 1)]
    )
    return run


def drag(tab: Page, plot: Locator, start: float, end: float) -> None:
    box = plot.bounding_box()
    assert box is not None
    tab.mouse.move(box["x"] + box["width"] * start, box["y"] + 50)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * end, box["y"] + 50, steps=4)
    tab.mouse.up()


def test_a_closer_look_is_finer_on_every_axis(tab: Page, alice: User) -> None:
    run = make_long_run(alice, MANY)
    open_run(tab, run)
    expect_values(tab, run)
    loss = tab.locator('[data-metric="loss"]')
    words = loss.locator(".chart-summary")
    expect(words).to_contain_text("32 steps a point")
    for axis in ("step", "tokens", "time"):
        tab.get_by_label("x axis").select_option(axis)
        tab.get_by_label("Steps shown").select_option("1000")
        expect(words).not_to_contain_text("steps a point")
        assert shown_steps(tab)[-300:] == list(range(MANY - 299, MANY + 1))
        tab.get_by_label("Steps shown").select_option("all")
        expect(words).to_contain_text("32 steps a point")
        drag(tab, loss.locator(".u-over"), 0.25, 0.35)
        expect(words).to_contain_text(re.compile(r"; [24] steps a point"))
        # Seen from the zoom, the last tenth is still that of all the run.
        tab.get_by_label("Steps shown").select_option("tenth")
        expect(words).to_contain_text("; 4 steps a point")
        assert shown_steps(tab)[-1] > MANY - 4
        tab.get_by_label("Steps shown").select_option("all")


def test_a_page_that_is_left_open_lets_the_server_hold_the_values(tab: Page, alice: User) -> None:
    run = make_long_run(alice, FEW)
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url) if "series.json" in request.url else None)
    open_run(tab, run)
    expect_values(tab, run)
    assert asked == []
    for first in (FEW + 1, FEW + 11):
        steps(run, range(first, first + 10), first_seq=first, loss=0.5)
        expect_values(tab, run)
    assert {name for url in asked for name in re.findall("name=([a-z]+)", url)} == {"loss", "tokens"}
    expect(tab.locator('[data-metric="loss"] .chart-summary')).to_contain_text("32 steps a point")


def test_a_long_tail_is_not_placed_anew_for_each_draw(tab: Page, alice: User) -> None:
    tab.goto("/runs/")
    num_placed = tab.evaluate(
        """async (path) => {
          const { Series } = await import(path);
          const series = new Series("loss");
          for (let step = 1; step <= 10000; step += 1) series.push(step, step, 1);
          let number = 0;
          series.tokensAt = (step) => { number += 1; return 64 * step; };
          const extent = series.extent("tokens");
          const { step } = series.view("tokens", 64 * 5000, 64 * 5003, 1000);
          return [extent, step, number < 60];
        }""",
        module_address(tab, "series.js"),
    )
    assert num_placed == [[64, 640_000], [4999, 5000, 5001, 5002, 5003, 5004], True]
