"""Runs side by side in a real browser: chosen in the list, drawn into one chart, kept up to date."""

from __future__ import annotations

import math
import re
from datetime import timedelta

from django.utils import timezone
from playwright.sync_api import Locator, Page, Route, expect

from runs.models import TrainingRun, User
from runs.pages.comparison import query_of
from runs.services import run_deletion
from tests.pages import recipe_seed, seed
from tests.pages.live.browser import LIVE
from tests.pages.live.run_page import add_steps, expect_live
from tests.pages.live.server import Server

pytestmark = LIVE
# How many pixels of a chart have the colour of each run's line, almost: edges are mixed with what is behind them.
_NUM_DRAWN = """(chart) => {
  const canvas = chart.querySelector("canvas");
  const context = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  return [...document.querySelectorAll("[data-run-keys] .run-line path")].map((path) => {
    const color = getComputedStyle(path).stroke.match(/\\d+/g).map(Number);
    let number = 0;
    for (let i = 0; i < data.length; i += 4) {
      const distance = color.reduce((sum, value, index) => sum + Math.abs(value - data[i + index]), 0);
      if (data[i + 3] > 200 && distance < 40) number += 1;
    }
    return number;
  });
}"""


# After a frame in which nothing was left to do.
_DRAWN_SO_FAR = (
    "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(drawn.splice(0)))))"
)


def open_runs(tab: Page, *runs: TrainingRun, num_lines: int, view: str = "") -> Locator:
    """Open the page that compares the runs and return its loss chart with these lines."""
    tab.goto(f"/runs/compare/?{query_of([run.public_id for run in runs])}{view}")
    return loss_of(tab, num_lines)


def loss_of(tab: Page, num_lines: int) -> Locator:
    chart = tab.locator('[data-metric="loss"]')
    expect(chart.locator(".chart-values li")).to_have_count(num_lines)
    return chart


def values_of(chart: Locator) -> list[str]:
    """Return what the chart says of each line: the run, its value and a note."""
    items = chart.locator(".chart-values li")
    return [" ".join(item.locator("bdi, span").all_text_contents()).strip() for item in items.all()]


def num_drawn(chart: Locator) -> list[int]:
    numbers: list[int] = chart.evaluate(_NUM_DRAWN)
    return numbers


def make_run(alice: User, name: str, num_steps: int, **values: float) -> TrainingRun:
    run = seed.make_run(alice, name=name)
    rows = [
        (2 * step, step, {"loss": 1 + 1 / step, "tokens": 100.0, **values})
        for step in range(1, num_steps + 1)
    ]
    seed.add_values(run, rows)
    return run


def test_runs_are_chosen_drawn_together_and_hidden(tab: Page, alice: User) -> None:
    for name, num_steps in (("first", 30), ("second", 20), ("third", 9)):
        make_run(alice, name, num_steps)
    tab.goto("/runs/")
    tab.get_by_role("button", name="Select").click()
    tab.get_by_label("Choose second").check()
    bar = tab.locator("[data-chosen]")
    expect(bar.get_by_text("Compare: choose one more")).not_to_have_attribute("href", re.compile("."))
    tab.get_by_label("Choose first").check()
    tab.get_by_role("link", name="Compare 2 runs").click()
    chart = loss_of(tab, 2)
    assert sorted(values_of(chart)) == [
        "first 1.033 lowest 1.033 at step 30",
        "second 1.050 lowest 1.050 at step 20",
    ]
    assert all(number > 20 for number in num_drawn(chart))
    expect(tab.get_by_role("link", name="third")).to_have_count(0)
    tab.get_by_label("Show first").uncheck()
    loss_of(tab, 1)
    assert values_of(chart) == ["second 1.050 lowest 1.050 at step 20"]
    place = int(tab.locator(".run-key", has_text="first").get_attribute("data-run-key") or "")
    assert num_drawn(chart)[place] == 0
    assert num_drawn(chart)[1 - place] > 20
    tab.get_by_label("Show second").uncheck()
    expect(chart.locator(".chart-summary")).to_have_text("All runs that have this are hidden.")
    tab.get_by_label("Show second").check()
    tab.reload()
    loss_of(tab, 1)
    expect(tab.get_by_label("Show first")).not_to_be_checked()
    tab.get_by_role("link", name="Leave first out").click()
    expect(tab.get_by_text("choose at least one more")).to_be_visible()
    tab.get_by_label("third").check()
    tab.get_by_role("button", name="Compare").click()
    expect(tab.get_by_role("heading", name="Compare 2 runs")).to_be_visible()


def test_the_keys_of_the_list_choose_and_compare(tab: Page, alice: User) -> None:
    make_run(alice, "one", 3)
    make_run(alice, "two", 3)
    tab.goto("/runs/")
    tab.keyboard.press("c")
    for key in "jxjx":
        tab.keyboard.press(key)
    expect(tab.get_by_role("link", name="Compare 2 runs")).to_be_visible()
    tab.keyboard.press("c")
    expect(tab.get_by_role("heading", name="Compare 2 runs")).to_be_visible()


def test_the_crosshair_says_the_values_of_all_runs(tab: Page, alice: User) -> None:
    long, short = make_run(alice, "long", 40), make_run(alice, "short", 20)
    rows = [(2 * step + 100, step, {"loss": math.nan if step == 22 else 3.0}) for step in (21, 22, 23)]
    seed.add_values(short, rows)
    recipe_seed.add_evaluations(long, [0, 40])
    tab.add_init_script('localStorage.setItem("smoothing", "0")')
    chart = open_runs(tab, long, short, num_lines=3)
    expect(chart.locator(".chart-bad")).to_have_text("1 not finite")
    expect(chart.locator(".chart-bad")).to_have_attribute("title", "short: 1, first at step 22")
    tokens = tab.locator('[data-metric="tokens"]')
    expect(tokens.locator(".chart-values li")).to_have_count(2)
    plot = chart.get_by_role("img", name="Loss per token by step, 3 lines")
    plot.focus()
    for _ in range(19):
        plot.press("ArrowLeft")
    expect(chart.locator(".chart-readout")).to_have_text("step 22")
    values = values_of(chart)
    assert values[:2] == ["long 1.045", "short not finite"]
    assert re.fullmatch(r"long validation \d\.\d+ step 0", values[2])
    # The other charts have theirs at the same place.
    expect(tokens.locator(".chart-readout")).to_have_text("step 22")
    plot.press("ArrowRight")
    plot.press("ArrowRight")
    assert values_of(chart)[1] == "short \u2013 so far at step 23"
    chart.get_by_role("button", name="Table").click()
    row = chart.locator("tbody tr", has=tab.locator("td:first-child", has_text=re.compile("^22$")))
    assert row.locator("td").all_text_contents() == ["22", "1.045", "not finite", ""]


def test_runs_of_all_lengths_share_each_axis(tab: Page, alice: User) -> None:
    long, short = make_run(alice, "long", 2600), make_run(alice, "short", 30)
    now = timezone.now()
    for run, num_s in ((long, 2600), (short, 130)):
        TrainingRun.objects.filter(pk=run.pk).update(created_at=now - timedelta(seconds=num_s))
    chart = open_runs(tab, long, short, num_lines=2)
    summary = chart.locator(".chart-summary")
    expect(summary).to_contain_text("each point is the mean of up to 4 steps")
    expect(summary).to_contain_text("smoothed with weight 0.60")
    tab.get_by_label("Smoothing").fill("0")
    expect(summary).not_to_contain_text("smoothed")
    for axis, words in (("tokens", r"^[\d\u202f]+ tokens$"), ("time", r"^(\d+ min )?\d+ s after the start$")):
        tab.get_by_label("x axis").select_option(axis)
        expect(chart.locator(".chart-values li")).to_have_count(2)
        plot = chart.get_by_role("img")
        plot.focus()
        plot.press("ArrowLeft")
        expect(chart.locator(".chart-readout")).to_have_text(re.compile(words))
        assert values_of(chart)[1] == "short \u2013 so far at step 30"
        plot.press("Escape")
    tab.get_by_label("x axis").select_option("step")
    over = chart.locator(".u-over")
    box = over.bounding_box()
    assert box is not None
    tab.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 50, steps=4)
    tab.mouse.up()
    expect(summary).not_to_contain_text("each point is the mean")
    expect(tab).to_have_url(re.compile("zoom="))
    tab.get_by_role("button", name="Whole range").click()
    expect(summary).to_contain_text("each point is the mean of up to 4 steps")


def test_what_a_run_does_meanwhile_arrives(tab: Page, server: Server, alice: User) -> None:
    done = make_run(alice, "done", 10)
    TrainingRun.objects.filter(pk=done.pk).update(state="closed")
    busy = seed.make_run(alice, name="busy")
    chart = open_runs(tab, done, busy, num_lines=1, view="#weight=0")
    expect_live(tab)
    expect(tab.locator(".run-key", has_text="busy")).to_contain_text("no values yet")
    add_steps(busy, [1, 2])
    loss_of(tab, 2)
    assert values_of(chart)[1] == "busy 1.000 lowest 1.000 at step 2"
    expect(tab.locator('[data-metric="grad_norm"]')).to_be_visible()
    server.kill()
    add_steps(busy, [3, 4])
    expect(tab.get_by_role("status").filter(has_text="Reconnecting")).to_be_visible()
    server.start()
    expect(chart.locator(".chart-values")).to_contain_text("busy0.5000")
    expect_live(tab)
    expect(tab.get_by_role("row", name="Last loss per token")).to_contain_text("0.5000")
    assert values_of(chart)[1] == "busy 0.5000 lowest 0.5000 at step 4"
    TrainingRun.objects.filter(pk=busy.pk).update(state="closed")
    expect(tab.locator("[data-live-state]")).to_be_hidden()
    expect(tab.locator(".run-key", has_text="busy")).to_contain_text("finished")


def test_a_run_that_goes_back_is_drawn_as_it_went_on(tab: Page, alice: User) -> None:
    other, run = make_run(alice, "other", 10), make_run(alice, "goes back", 1500)
    chart = open_runs(tab, other, run, num_lines=2, view="#weight=0")
    expect(chart.locator(".chart-summary")).to_contain_text("mean of up to 2 steps")
    rows = [(3000 + step, step, {"loss": 7.0, "tokens": 100.0}) for step in range(700, 703)]
    seed.add_values(run, rows)
    expect(chart.locator(".chart-values")).to_contain_text("goes back7.000")
    expect(chart.locator(".chart-summary")).to_contain_text(
        "what a run left behind when it went back is not drawn"
    )
    plot = chart.get_by_role("img")
    plot.focus()
    plot.press("ArrowLeft")
    expect(chart.locator(".chart-readout")).to_have_text("step 702")


def test_a_run_that_is_deleted_meanwhile_leaves_the_page(tab: Page, server: Server, alice: User) -> None:
    server.refused = ("status of 404",)
    runs = [make_run(alice, name, 5) for name in ("first", "second", "third")]
    open_runs(tab, *runs, num_lines=3)
    run_deletion.delete(runs[1])
    expect(tab.get_by_role("heading", name="Compare 2 runs")).to_be_visible()
    expect(tab.get_by_text(f"There is no training run {runs[1].public_id}")).to_be_visible()


def test_differences_only_is_remembered(tab: Page, alice: User) -> None:
    payload = "<img src=x onerror=alert(1)>"
    first = seed.make_run(alice, name=payload, user_metadata={payload: payload})
    second = seed.make_run(alice, name="second", lora_rank=64)
    tab.goto(f"/runs/compare/?{query_of([first.public_id, second.public_id])}")
    rank, model = tab.get_by_role("row", name="LoRA rank"), tab.get_by_role("row", name="Base model")
    expect(rank).to_contain_text("differs from the first: 64")
    expect(model).to_be_hidden()
    tab.get_by_label("Differences only").uncheck()
    expect(model).to_be_visible()
    tab.reload()
    expect(model).to_be_visible()
    tab.get_by_label("Differences only").check()
    tab.reload()
    expect(rank).to_be_visible()
    expect(model).to_be_hidden()
    expect(tab.get_by_role("rowheader", name=payload)).to_be_visible()


def test_on_a_phone_the_table_alone_scrolls(tab: Page, alice: User) -> None:
    runs = [make_run(alice, f"a run with a rather long name {number}", 5) for number in range(4)]
    tab.set_viewport_size({"width": 390, "height": 800})
    open_runs(tab, *runs, num_lines=4)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    table = tab.get_by_role("region", name="Table of the runs")
    head = table.get_by_role("rowheader", name="Tokens")
    left = head.evaluate("(head) => head.getBoundingClientRect().left")
    table.evaluate("(table) => table.scrollTo(200, 0)")
    assert table.evaluate("(table) => table.scrollLeft") == 200
    assert head.evaluate("(head) => head.getBoundingClientRect().left") == left


def test_a_line_that_comes_leaves_other_charts_as_they_are(tab: Page, alice: User) -> None:
    runs = [make_run(alice, name, 30, reward=1.0) for name in ("first", "second")]
    TrainingRun.objects.update(state="closed")
    tab.add_init_script(
        """window.drawn = [];
        const { clearRect } = CanvasRenderingContext2D.prototype;
        CanvasRenderingContext2D.prototype.clearRect = function (...place) {
          drawn.push(this.canvas.closest("[data-metric]")?.dataset.metric);
          return clearRect.apply(this, place);
        };"""
    )
    held: list[Route] = []
    tab.route("**/series.json?name=reward&*", lambda route: held.append(route))
    chart = open_runs(tab, *runs, num_lines=2)
    expect(tab.locator('[data-metric="reward"] .chart-summary')).to_have_text("Loading\u2026")
    assert "loss" in tab.evaluate(_DRAWN_SO_FAR)
    held[0].continue_()
    reward = tab.locator('[data-metric="reward"] .chart-values li')
    expect(reward).to_have_count(1)
    held[1].continue_()
    expect(reward).to_have_count(2)
    expect(tab.locator('[data-metric="tokens"] .chart-values li')).to_have_count(2)
    assert set(tab.evaluate("drawn")) == {"reward", "tokens"}
    assert len(values_of(chart)) == 2


def test_the_values_of_all_runs_can_be_downloaded(tab: Page, alice: User) -> None:
    runs = [make_run(alice, name, 3) for name in ("first", "second")]
    open_runs(tab, *runs, num_lines=2)
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Download CSV").click()
    assert download.value.suggested_filename == "compare-2-runs.csv"
    text = download.value.path().read_text()
    assert text.splitlines()[0] == "run,run_id,step,tokens_so_far,seconds,loss,tokens"
    assert f"second,{runs[1].public_id},3,300," in text
