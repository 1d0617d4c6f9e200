"""Outliers in the charts of a run, in a real browser: they do not stretch the y axis, and are not hidden silently."""

from __future__ import annotations

import math

import pytest
from playwright.sync_api import Locator, Page, expect

from runs.models import TrainingRun, User
from tests.pages import seed
from tests.pages.live.browser import LIVE, module_address
from tests.pages.live.run_page import expect_values, open_run, steps

pytestmark = LIVE
SPIKE = 900.0
# What the loss chart's latest drawing has written at its y axis, and all that pictures of it say.
WATCH_LABELS = """
window.labels = [];
window.written = [];
const does = {
  clearRect: (ctx) => { if (ctx.canvas.closest('[data-metric="loss"]')) labels = []; },
  fillText: (ctx, text) => {
    if (!ctx.canvas.isConnected) written.push(text);
    else if (ctx.textAlign === "right" && ctx.canvas.closest('[data-metric="loss"]')) labels.push(text);
  },
};
for (const [name, note] of Object.entries(does)) {
  const original = CanvasRenderingContext2D.prototype[name];
  CanvasRenderingContext2D.prototype[name] = function (...values) {
    note(this, ...values);
    return original.apply(this, values);
  };
}
"""
HAS_MARK = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < data.length; i += 4) if (data[i] === 0xb8 && data[i + 1] === 0x62 && data[i + 2] === 0x0b) return true;
  return false;
}"""


@pytest.fixture
def spiked(alice: User) -> TrainingRun:
    """Return a run whose losses are near 2 but for that of step 3."""
    run = seed.make_run(alice)
    rows = [(step, step, {"loss": SPIKE if step == 3 else 2 + math.sin(step) / 4}) for step in range(1, 41)]
    seed.add_values(run, rows)
    return run


def open_watched(tab: Page, run: TrainingRun) -> Locator:
    """Open a run's page and return its loss chart."""
    tab.add_init_script(WATCH_LABELS)
    open_run(tab, run)
    expect_values(tab, run)
    return tab.locator('[data-metric="loss"]')


def expect_axis(tab: Page, condition: str) -> None:
    """Wait until the highest label of the loss chart's y axis, `top`, fulfils a condition."""
    tab.wait_for_function(
        f"""() => {{
          const top = Math.max(...labels.map((text) => Number(text.replace("k", "e3"))));
          return Number.isFinite(top) && {condition};
        }}"""
    )


def at_step(tab: Page, chart: Locator, step: int, *, of: int) -> str:
    """Return what the crosshair says at a step of as many."""
    box = chart.locator(".u-over").bounding_box()
    assert box is not None
    tab.mouse.move(box["x"] + box["width"] * (step - 1) / (of - 1), box["y"] + 50)
    return chart.locator(".chart-readout").text_content() or ""


def test_one_spike_does_not_flatten_all_others_and_is_told(tab: Page, spiked: TrainingRun) -> None:
    chart = open_watched(tab, spiked)
    note = chart.locator(".chart-outliers")
    expect_axis(tab, "top < 10")
    expect(note).to_have_text("1 point above")
    assert "the highest is 900.0" in (note.get_attribute("title") or "")
    expect(tab.get_by_role("img", name="Loss per token")).to_have_accessible_name(
        "Loss per token: 2.210 \u2192 2.186, lowest 1.750 at step 11; outliers beyond the axis: 1 point above"
    )
    assert chart.locator("canvas").evaluate(HAS_MARK), "no mark where the point would be"
    # No value is altered.
    assert "900.0" in at_step(tab, chart, 3, of=40)
    chart.get_by_role("button", name="Table").click()
    assert chart.locator("tbody tr:nth-last-child(3) td").nth(1).text_content() == "900.0"
    with tab.expect_download():
        chart.get_by_role("button", name="PNG").click()
    assert "Loss per token by step, outliers left out: 1 point above" in tab.evaluate("written")


def test_all_is_shown_to_who_wants_it_and_that_is_remembered(tab: Page, spiked: TrainingRun) -> None:
    chart = open_watched(tab, spiked)
    toggle, note = tab.get_by_label("Ignore outliers"), chart.locator(".chart-outliers")
    expect(toggle).to_be_checked()
    toggle.uncheck()
    expect_axis(tab, "top >= 500")
    expect(note).to_be_hidden()
    assert not chart.locator("canvas").evaluate(HAS_MARK)
    assert "outliers=shown" in tab.url
    link = tab.url
    tab.goto("/runs/")
    open_run(tab, spiked)
    expect(toggle).not_to_be_checked()
    toggle.check()
    expect_axis(tab, "top < 10")
    note.click()  # the note leads to what it tells of
    expect(toggle).not_to_be_checked()
    expect_axis(tab, "top >= 500")
    toggle.check()
    tab.goto("/runs/")
    tab.goto(link)
    expect(toggle).not_to_be_checked()
    assert tab.evaluate("localStorage.getItem('outliers')") == "ignored"


def test_outliers_are_those_of_what_is_in_view(tab: Page, spiked: TrainingRun) -> None:
    chart = open_watched(tab, spiked)
    note = chart.locator(".chart-outliers")
    expect(note).to_have_text("1 point above")
    steps(spiked, [41, 42], first_seq=100, loss=-SPIKE)
    expect(note).to_have_text("1 point above, 2 below")
    tab.evaluate("location.hash = 'zoom=20,40&weight=0'")
    expect(note).to_be_hidden()
    expect_axis(tab, "top < 10")
    tab.evaluate("location.hash = 'zoom=1,20&weight=0'")
    expect(note).to_have_text("1 point above")
    # Behind the spike, only the smoothed line still comes down from it.
    tab.evaluate("location.hash = 'zoom=6,40&weight=0.6'")
    expect(note).to_have_text("smoothed line cut off")
    expect_axis(tab, "top < 10")


def test_a_logarithmic_axis_has_room_for_a_spike(tab: Page, spiked: TrainingRun) -> None:
    chart = open_watched(tab, spiked)
    tab.get_by_label("Log y").check()
    expect_axis(tab, "top >= 500")
    expect(chart.locator(".chart-outliers")).to_be_hidden()
    steps(spiked, [41], first_seq=100, loss=1e9)
    expect(chart.locator(".chart-outliers")).to_have_text("1 point above")
    expect_axis(tab, "top < 1e6")


def test_a_long_run_counts_its_buckets(tab: Page, alice: User) -> None:
    run = seed.make_run(alice)
    rows = [
        (step, step, {"loss": SPIKE if step in (3, 9000) else 2.0 + step % 7 / 10})
        for step in range(1, 13_001)
    ]
    seed.add_values(run, rows)
    chart = open_watched(tab, run)
    expect(chart.locator(".chart-outliers")).to_have_text("2 points above")
    expect_axis(tab, "top < 12")


SPREAD = [2 + math.sin(number) / 4 for number in range(40)]


@pytest.mark.parametrize(
    ("lines", "is_log", "expected"),
    [
        ([(SPREAD, [])], False, None),
        ([([SPIKE, *SPREAD], [])], False, [SPIKE]),
        ([([SPIKE, *SPREAD[:6]], [])], False, None),  # too few to say
        ([([SPIKE] * 8 + SPREAD, [])], False, None),  # too many to be outliers
        ([([0.0, 1e-5, 5e-5, *[1e-4] * 60], [])], False, None),  # a warm-up
        ([([0.0] * 60 + [1.0, 1.0], [])], False, None),  # mostly nothing, and sometimes something
        (
            [([2 / step for step in range(1, 61)], [])],
            True,
            None,
        ),  # a power is no outlier of a logarithmic axis
        ([([1e9, *SPREAD], [])], True, [1e9]),
        ([(SPREAD, []), ([9.0] * 5, [])], False, None),  # a line whose values all are far from another's
        ([([SPIKE, *SPREAD], []), ([SPIKE] * 5, [])], False, None),  # seen where the other line goes
        ([(SPREAD, [SPIKE] * 40)], False, None),  # a smoothed line of which nothing would be left
    ],
)
def test_the_rule(
    tab: Page, lines: list[tuple[list[float], list[float]]], is_log: bool, expected: list[float] | None
) -> None:
    tab.goto("/runs/")
    found = tab.evaluate(
        """async ([path, lines, isLog]) => {
          const { beyond } = await import(path);
          const asked = lines.map(([values, smooth]) => ({ x: [...values.keys()], columns: [values], smooth: smooth.length ? smooth : null }));
          return beyond(asked, [0, 1000], isLog)?.above.map(([, value]) => value) ?? null;
        }""",
        [module_address(tab, "outliers.js"), lines, is_log],
    )
    assert found == expected
