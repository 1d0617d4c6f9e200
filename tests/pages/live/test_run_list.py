"""The list of runs in a real browser while more runs begin than it can hold."""

from __future__ import annotations

from django.db import transaction
from playwright.sync_api import Page, expect

from runs import events
from runs.models import TrainingRun, User
from runs.services import run_deletion
from runs.services.run_rows import MAX_WATCHED_ROWS
from tests.pages import seed
from tests.pages.live.browser import LIVE, shoot
from tests.pages.live.run_page import add_steps, expect_live
from tests.pages.live.server import Server

pytestmark = LIVE


def begin(alice: User, first: TrainingRun, num: int) -> TrainingRun:
    """Enter runs of one session all at once; returns the newest."""
    with transaction.atomic():
        for number in range(num):
            newest = seed.make_run(alice, name=f"new {number + 1}", session=first.session)
        events.run_changed(newest.pk, alice.pk, newest.public_id)
    return newest


def test_a_list_that_is_full_stays_live_and_says_where_the_older_ones_are(
    tab: Page,
    server: Server,
    alice: User,
) -> None:
    first = seed.make_run(alice, name="first")
    second = seed.make_run(alice, name="second", session=first.session)
    tab.goto("/runs/")
    status = tab.locator("[data-live-state]")
    expect(status).to_have_text("Live")
    tab.get_by_role("button", name="Select").click()
    tab.get_by_label("Choose first").check()
    again = tab.get_by_role("link", name="Read the list again")
    expect(again).to_be_hidden()
    newest = begin(alice, first, MAX_WATCHED_ROWS + 5)
    rows = tab.locator("[data-run]")
    expect(tab.locator(f'[data-run="{newest.public_id}"]')).to_be_visible()
    expect(rows).to_have_count(MAX_WATCHED_ROWS + 1)
    expect(tab.get_by_label("Choose first")).to_be_checked()  # what somebody chose is not taken away
    expect(tab.locator(f'[data-run="{second.public_id}"]')).to_have_count(0)
    expect(again).to_be_visible()
    again.scroll_into_view_if_needed()
    shoot(tab, "full-list")
    server.kill()
    expect(status).to_have_text("Reconnecting\u2026")
    server.start()
    expect(status).to_have_text("Live")
    with transaction.atomic():
        TrainingRun.objects.filter(pk=newest.pk).update(name="renamed since")
        events.run_changed(newest.pk, alice.pk, newest.public_id)
    expect(tab.locator(f'[data-run="{newest.public_id}"]')).to_contain_text("renamed since")


def test_a_run_that_is_deleted_elsewhere_leaves_the_list(tab: Page, alice: User) -> None:
    stays, goes = seed.make_run(alice, name="stays"), seed.make_run(alice, name="goes")
    tab.goto("/runs/")
    rows = tab.locator("[data-run]")
    expect(rows).to_have_count(2)
    expect(tab.locator("[data-live-state]")).to_have_text("Live")
    run_deletion.delete(goes)
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text(stays.name)


def test_a_row_that_changes_stays_the_one_that_is_pointed_at(tab: Page, alice: User) -> None:
    """A run that trains changes its row twice a second, in the middle of a click too."""
    run = seed.make_run(alice, name="busy")
    tab.goto("/runs/")
    expect_live(tab)
    row = tab.locator(f'[data-run="{run.public_id}"]')
    tab.get_by_role("button", name="Select").click()
    tab.get_by_label("Choose busy").check()
    tab.keyboard.press("Tab")
    row.get_by_role("link").focus()
    node = row.element_handle()
    add_steps(run, range(1, 6))
    expect(row).to_contain_text("0.4000")
    assert node.evaluate("node => node.isConnected")
    expect(row.get_by_role("link")).to_be_focused()
    expect(tab.get_by_label("Choose busy")).to_be_checked()
    row.get_by_role("link").blur()
    tab.keyboard.press("j")
    row.locator(".cell-step").hover()
    tab.mouse.down()
    add_steps(run, range(6, 11))
    expect(row).to_contain_text("0.2000")
    expect(row).to_have_class("run-row is-selected")
    tab.mouse.up()
    tab.wait_for_url(f"**/{run.public_id.replace(':', '*')}/")
