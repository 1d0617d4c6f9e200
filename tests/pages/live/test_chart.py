"""The pages in a real browser against a real server: live, and complete after every interruption."""

from __future__ import annotations

import math
import re
import shutil
from datetime import timedelta

import pytest
from django.contrib.sessions.models import Session
from django.utils import timezone
from playwright.sync_api import Browser, Page, expect

from runs import events
from runs.models import User
from runs.services import accounts
from tests.pages import seed
from tests.pages.live.browser import LIVE, module_address
from tests.pages.live.run_page import add_steps, expect_values, open_run, shown_steps
from tests.pages.live.server import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = LIVE


def test_a_value_arrives_while_the_page_is_open(tab: Page, alice: User) -> None:
    run = seed.make_run(alice, name="watched")
    open_run(tab, run)
    expect(tab.get_by_text("No values yet")).to_be_visible()
    expect(tab.get_by_role("status").filter(has_text="Live")).to_be_visible()
    for last in range(1, 4):
        add_steps(run, [last])
        expect_values(tab, run)
    assert shown_steps(tab) == [1, 2, 3]
    expect(tab.locator("[data-part=facts]")).to_contain_text("0.6667")
    expect(tab.locator('[data-metric="loss"] canvas')).to_be_visible()


def test_a_reload_shows_the_same_values(tab: Page, alice: User) -> None:
    run = seed.make_run(alice)
    add_steps(run, range(1, 61))
    open_run(tab, run)
    expect_values(tab, run)
    before = shown_steps(tab)
    add_steps(run, range(61, 71))
    expect_values(tab, run)
    tab.reload()
    expect_values(tab, run)
    assert before == list(range(1, 61))
    assert shown_steps(tab) == list(range(1, 71))


def test_a_restarted_server_costs_no_value_and_doubles_none(tab: Page, server: Server, alice: User) -> None:
    run = seed.make_run(alice)
    add_steps(run, range(1, 21))
    open_run(tab, run)
    expect_values(tab, run)
    for first in (21, 41):
        server.kill()
        add_steps(run, range(first, first + 10))
        expect(tab.get_by_role("status").filter(has_text="Reconnecting")).to_be_visible()
        server.start()
        add_steps(run, range(first + 10, first + 20))
        expect_values(tab, run)
    assert shown_steps(tab) == list(range(1, 61))


def test_a_page_left_and_returned_to_catches_up(tab: Page, alice: User) -> None:
    run = seed.make_run(alice)
    add_steps(run, range(1, 11))
    open_run(tab, run)
    expect_values(tab, run)
    tab.goto("about:blank")
    add_steps(run, range(11, 31))
    tab.go_back()
    expect_values(tab, run)
    assert shown_steps(tab) == list(range(1, 31))


def test_a_long_run_is_drawn_from_buckets_and_goes_on_live(tab: Page, alice: User) -> None:
    run = seed.make_run(alice)
    seed.add_values(run, seed.curve(13_000, spike_at=[7000], nan_at=[9000]))
    open_run(tab, run)
    expect_values(tab, run)
    chart = tab.locator('[data-metric="loss"]')
    expect(chart).to_contain_text("1 not finite")
    expect(chart).to_contain_text("steps a point")
    add_steps(run, range(13_001, 13_011))
    expect_values(tab, run)


def test_zoom_follow_log_and_keys(tab: Page, alice: User) -> None:
    run = seed.make_run(alice)
    add_steps(run, range(1, 201))
    open_run(tab, run)
    expect_values(tab, run)
    over = tab.locator('[data-metric="loss"] .u-over')
    over.wait_for()
    box = over.bounding_box()
    assert box is not None
    tab.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50, steps=4)
    tab.mouse.up()
    follow = tab.get_by_role("button", name="ollow")
    expect(follow).to_be_visible()
    assert 45 < shown_steps(tab)[0] < 55
    expect(tab).to_have_url(re.compile("zoom="))
    add_steps(run, range(201, 211))
    expect(follow).to_contain_text("40 new values")
    follow.click()
    expect(follow).to_be_hidden()
    assert shown_steps(tab)[-1] == 210
    tab.get_by_label("Log y").check()
    tab.get_by_label("x axis").select_option("time")
    plot = tab.get_by_role("img", name="Loss per token")
    plot.focus()
    plot.press("ArrowLeft")
    readout = tab.locator('[data-metric="learning_rate"] .chart-readout')
    expect(readout).to_contain_text("1.000e-4")
    tab.get_by_label("x axis").select_option("step")
    plot.press("ArrowLeft")
    plot.press("ArrowLeft")
    expect(readout).to_contain_text("step 209")  # the crosshairs of all charts move together


@pytest.mark.parametrize("axis", ["step", "tokens", "time"])
def test_the_last_steps_are_shown_on_every_axis(tab: Page, alice: User, axis: str) -> None:
    run = seed.make_run(alice)
    values = [(2 * step, step, {"loss": 2 / step, "tokens": 64.0}) for step in range(10, 3001, 10)]
    seed.add_values(run, values, step_s=7.0)
    open_run(tab, run)
    expect_values(tab, run)
    tab.get_by_label("x axis").select_option(axis)
    tab.get_by_label("Steps shown").select_option("1000")
    # One more on the left, to which the line goes on.
    assert shown_steps(tab) == list(range(1990, 3001, 10))


def test_a_button_that_copies_says_again_what_it_copies(tab: Page, alice: User) -> None:
    open_run(tab, seed.make_run(alice))
    button = tab.locator("[data-copy-view]")
    expect(button).to_have_text("Copy link")
    button.click()
    expect(button).to_have_text("Copied")
    button.click()
    expect(button).to_have_text("Copy link")


def test_hostile_names_are_text(tab: Page, alice: User, tmp_path_factory: pytest.TempPathFactory) -> None:
    payload = "<img src=x onerror=alert(1)>"
    tokenizer = seed.make_base_model(tmp_path_factory.mktemp("tokenizer"))
    run = seed.make_run(alice, name=payload, user_metadata={payload: payload})
    seed.add_values(
        run, [(1, 1, {payload: 1.0, "constructor": 2.0, "__proto__": 3.0}), (2, 2, {payload: 1.0})]
    )
    seed.add_sample(run, tokenizer.encode(payload).ids, [tokenizer.encode(payload).ids])
    open_run(tab, run)
    expect(tab.locator("[data-chart-grid]")).to_have_attribute("data-num-values", "4")
    expect(tab.get_by_role("heading", name=payload, level=3)).to_be_visible()
    expect(tab.locator(".sample-text")).to_contain_text(payload)
    tab.goto("/runs/")
    expect(tab.get_by_role("link", name=payload)).to_be_visible()
    events.run_changed(run.pk, run.owner_id, run.public_id)
    assert tab.locator("img[src=x]").count() == 0


def test_the_list_is_live_and_moves_by_keys(tab: Page, alice: User) -> None:
    first = seed.make_run(alice, name="first")
    tab.goto("/runs/")
    expect(tab.get_by_role("status").filter(has_text="Live")).to_be_visible()
    # A run whose last value is some seconds old waits for its client.
    add_steps(first, range(1, 6), ends_at=timezone.now() + timedelta(hours=1))
    row = tab.locator(f'[data-run="{first.public_id}"]')
    expect(row).to_contain_text("0.4000")
    expect(row).to_contain_text("running")
    expect(row.locator("svg")).to_be_visible()
    seed.make_run(alice, name="second")
    expect(tab.locator("[data-run]").first).to_contain_text("second")
    tab.keyboard.press("/")
    expect(tab.get_by_role("searchbox")).to_be_focused()
    tab.get_by_role("searchbox").blur()
    tab.keyboard.press("?")
    expect(tab.get_by_role("heading", name="Keyboard")).to_be_visible()
    tab.keyboard.press("Escape")
    for key in ("j", "j", "Enter"):
        tab.keyboard.press(key)
    tab.wait_for_url("**/runs/*train*/")
    expect(tab.get_by_role("heading", level=1)).to_contain_text("first")


def test_the_first_run_takes_the_place_of_the_instructions(tab: Page, alice: User) -> None:
    tab.goto("/runs/")
    expect(tab.get_by_role("heading", name="Run your own loop")).to_be_visible()
    expect(tab.get_by_role("status").filter(has_text="Live")).to_be_visible()
    seed.make_run(alice, name="here I am")
    expect(tab.get_by_role("link", name="here I am")).to_be_visible()


def test_a_login_link_signs_in_and_a_theme_stays(browser: Browser, server: Server, alice: User) -> None:
    context = browser.new_context(base_url=server.address)
    tab = context.new_page()
    tab.goto(f"/login/{accounts.create_login_link(alice)}/")
    tab.get_by_role("button", name="Sign in").click()
    tab.wait_for_url("**/runs/")
    tab.goto("/settings/")
    tab.get_by_label("Dark").check()
    tab.reload()
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    tab.get_by_role("button", name="Sign out").click()
    tab.wait_for_url("**/login/")
    context.close()


def test_a_page_that_comes_back_says_that_it_is_signed_out_or_its_run_gone(
    tab: Page, server: Server, alice: User
) -> None:
    run, status = seed.make_run(alice), tab.locator("[data-live-state]")
    tab.goto("/runs/")
    expect(status).to_have_text("Live")
    server.kill()
    sessions = Session.objects.all()
    kept = list(sessions)
    sessions.delete()
    server.start()
    expect(status).to_have_text("Signed out")
    Session.objects.bulk_create(kept)
    open_run(tab, run)
    expect(status).to_have_text("Live")
    server.refused = ("status of 404",)  # its panels are read again some seconds after it was opened
    server.kill()
    run.delete()
    server.start()
    expect(status).to_have_text("No longer there")


def test_a_zoomed_long_run_that_goes_back_is_read_anew(tab: Page, alice: User) -> None:
    """What is held of the past is the range alone, but the past ends where it did."""
    tab.goto("/runs/")
    is_outdated = tab.evaluate(
        """async (path) => {
          const { Series } = await import(path);
          const part = (first, last) => ({
            step: [first], last_step: [last], time_s: [0], mean: [1], low: [1], high: [1], num_nonfinite: [0], num_values: [last - first + 1],
            num_abandoned: 0, abandoned: [], smoothing: { numerator: 0, denominator: 0, step: 0 },
          });
          const series = new Series("loss");
          series.setHistory(part(1, 9000));
          series.setHistory(part(1, 100), [1, 100]);
          series.push(8000, 0, 1);
          return series.isOutdated;
        }""",
        module_address(tab, "series.js"),
    )
    assert is_outdated is True


def test_a_validation_loss_that_is_not_finite_is_seen(tab: Page, alice: User) -> None:
    run = seed.make_run(alice)
    values = [(2 * step, step, {"loss": 2 / step}) for step in range(1, 41)]
    for _, step, named in values[9::10]:
        named["validation_loss"] = math.nan if step == 20 else 3 / step
    seed.add_values(run, values)
    open_run(tab, run)
    chart = tab.locator('[data-metric="loss"]')
    expect(chart.locator(".chart-bad")).to_have_text("1 not finite, first at step 20")
    shown_steps(tab)
    assert chart.locator("tbody tr td:last-child").all_text_contents()[::10] == [
        "0.07500",
        "0.1000",
        "not finite",
        "0.3000",
    ]
    assert chart.locator("canvas").evaluate(
        """(canvas) => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          for (let i = 0; i < data.length; i += 4) if (data[i] === 0xd4 && data[i + 1] === 0x2a && data[i + 2] === 0x2a) return true;
          return false;
        }"""
    ), "no mark in the colour of what is not finite"
    strokes = tab.evaluate(
        """async (path) => {
          const { drawFaint } = await import(path);
          const calls = [];
          const record = (_, name) => (...values) => { if (/^(move|line)To$/.test(name)) calls.push([name, values[0]]); };
          const ctx = new Proxy({}, { get: record, set: () => true });
          drawFaint({ ctx, bbox: {}, scales: { y: { distr: 1 } }, valToPos: (value) => value }, [1, 2, 3, 4, 5], [1, 2, null, 4, 5], "");
          return calls;
        }""",
        module_address(tab, "overlays.js"),
    )
    assert strokes == [["moveTo", 1], ["lineTo", 2], ["moveTo", 4], ["lineTo", 5]]


def test_a_logarithmic_axis_says_what_lies_below_it(tab: Page, alice: User) -> None:
    run = seed.make_run(alice)
    seed.add_values(run, [(step, step, {"loss": -1.0 if step == 4 else 1 / step}) for step in range(1, 9)])
    open_run(tab, run)
    tab.get_by_label("Log y").check()
    chip = tab.locator('[data-metric="loss"] .chart-floor')
    expect(chip).to_have_text("1 point reaches 0 or below")
    seed.add_values(run, [(9, 9, {"loss": 0.0})])
    expect(chip).to_have_text("2 points reach 0 or below")
    shown = tab.evaluate(
        """async (path) => {
          const { aboveZero } = await import(path);
          return aboveZero([1, 2, 3, 4], [[5, 4, -2, null], [5, 4.5, 1, null], [6, 8, -1, null], [3, -2, -3, null]]);
        }""",
        module_address(tab, "axes.js"),
    )
    assert shown["floored"] == [2, 3]
    assert shown["columns"] == [
        [5, 4, None, None],
        [5, 4.5, 1, None],
        [6, 8, None, None],
        [3, 1, None, None],
    ]
