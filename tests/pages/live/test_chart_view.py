"""What the charts of a run show, in a real browser: the zone of their times, and the address that leads to the same view."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from playwright.sync_api import Page, expect

from runs.models import TrainingRun, User
from tests.pages import seed
from tests.pages.live.browser import LIVE
from tests.pages.live.run_page import expect_values, open_run, shown_steps

pytestmark = LIVE


@pytest.fixture
def trained(alice: User) -> TrainingRun:
    """Return a run whose last step was in summer, at noon of UTC."""
    run = seed.make_run(alice)
    values = [(2 * step, step, {"loss": 2 / step, "tokens": 64.0}) for step in range(1, 201)]
    seed.add_values(run, values, ends_at=datetime(2026, 7, 1, 12, tzinfo=UTC))
    return run


def open_in(tab: Page, run: TrainingRun, zone: str) -> None:
    session = tab.context.new_cdp_session(tab)
    session.send("Emulation.setTimezoneOverride", {"timezoneId": zone})
    open_run(tab, run)
    expect_values(tab, run)


@pytest.mark.parametrize(
    ("zone", "title", "moment"),
    [
        ("Asia/Singapore", "time (UTC+8)", "20:00:00 UTC+8"),
        ("Europe/Berlin", "time (UTC+2)", "14:00:00 UTC+2"),
        ("America/St_Johns", "time (UTC\u22122:30)", "09:30:00 UTC\u22122:30"),
        ("UTC", "time (UTC)", "12:00:00 UTC"),
    ],
)
def test_times_say_their_zone(tab: Page, trained: TrainingRun, zone: str, title: str, moment: str) -> None:
    open_in(tab, trained, zone)
    axis = tab.get_by_label("x axis")
    expect(axis.locator("option").last).to_have_text("time")
    axis.select_option("time")
    expect(axis.locator("option:checked")).to_have_text(title)
    plot = tab.get_by_role("img", name="Loss per token")
    plot.focus()
    plot.press("ArrowLeft")
    chart = tab.locator('[data-metric="loss"]')
    expect(chart.locator(".chart-readout")).to_contain_text(moment)
    tab.evaluate(
        """() => {
          window.written = [];
          CanvasRenderingContext2D.prototype.fillText = (text) => { written.push(text); };
        }"""
    )
    with tab.expect_download():
        chart.get_by_role("button", name="PNG").click()
    assert f"Loss per token by {title}, outliers left out: 3 points above" in tab.evaluate("written")


def test_an_address_that_is_pasted_over_the_same_run_is_followed(tab: Page, trained: TrainingRun) -> None:
    open_run(tab, trained)
    expect_values(tab, trained)
    plain = tab.url
    assert shown_steps(tab)[0] == 1
    tab.evaluate("location.href = `${location.href}#axis=time&log=1&weight=0.25`")
    expect(tab.get_by_label("x axis")).to_have_value("time")
    expect(tab.get_by_label("Log y")).to_be_checked()
    expect(tab.get_by_label("Smoothing")).to_have_value("0.25")
    tab.evaluate("location.hash = 'zoom=50,99'")
    expect(tab.get_by_role("button", name="Follow")).to_be_visible()
    assert (shown_steps(tab)[0], shown_steps(tab)[-1]) == (49, 100)
    expect(tab.get_by_label("x axis")).to_have_value("step")
    tab.go_back()
    expect(tab.get_by_role("button", name="Follow")).to_be_hidden()
    expect(tab.get_by_label("x axis")).to_have_value("time")
    tab.go_back()
    assert tab.url == plain
    expect(tab.get_by_label("x axis")).to_have_value("step")
    expect(tab.get_by_label("Smoothing")).to_have_value("0.6")
    assert shown_steps(tab)[0] == 1


def test_a_place_on_the_page_is_no_view(tab: Page, trained: TrainingRun) -> None:
    open_run(tab, trained)
    expect_values(tab, trained)
    tab.get_by_label("Log y").check()
    tab.evaluate("location.hash = 'content'")
    tab.get_by_label("x axis").select_option("time")
    expect(tab.get_by_label("Log y")).to_be_checked()
    assert "log=1" in tab.url


def test_a_copied_link_has_the_smoothing_and_changes_nobodys_own(tab: Page, trained: TrainingRun) -> None:
    open_run(tab, trained)
    expect_values(tab, trained)
    tab.get_by_label("Smoothing").fill("0.9")
    link = tab.url
    assert "weight=0.9" in link
    tab.goto("/runs/")
    tab.evaluate("localStorage.setItem('smoothing', '0.1')")
    tab.goto(link)
    expect(tab.get_by_label("Smoothing")).to_have_value("0.9")
    assert tab.evaluate("localStorage.getItem('smoothing')") == "0.1"
    tab.get_by_role("button", name="Copy link").click()
    expect(tab.locator("[data-copy-view]")).to_have_attribute("data-copy-text", tab.url)
    assert "weight=0.9" in tab.url


@pytest.mark.parametrize("axis", ["step", "time"])
def test_a_phone_shows_all_that_the_crosshair_says(tab: Page, trained: TrainingRun, axis: str) -> None:
    tab.set_viewport_size({"width": 390, "height": 900})
    open_in(tab, trained, "America/St_Johns")
    tab.get_by_label("x axis").select_option(axis)
    plot = tab.get_by_role("img", name="Loss per token")
    plot.focus()
    top = plot.bounding_box()
    plot.press("ArrowLeft")
    readout = tab.locator('[data-metric="loss"] .chart-readout')
    expect(readout).to_contain_text("step 200")
    expect(readout).to_contain_text("0.01000")
    expect(readout).to_contain_text("smooth 0.0100")
    if axis == "time":
        expect(readout).to_contain_text("09:30:00 UTC\u22122:30")
    assert readout.evaluate("(element) => element.scrollWidth <= element.clientWidth")
    assert plot.bounding_box() == top, "the chart jumps under the finger"
