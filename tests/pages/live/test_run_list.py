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
