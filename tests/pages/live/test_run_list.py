"""The list of runs in a real browser while more runs begin than it can hold."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from django.db import transaction
from django.db.models.functions import Now
from django.utils import timezone
from playwright.sync_api import Page, expect
from tokenizers import Tokenizer

from runs import events
from runs.models import BaseModel, TrainingRun, User, Worker
from runs.pages.run_list import PAGE_SIZE
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


def test_the_warnings_come_and_go_while_the_page_is_open(
    tab: Page, alice: User, tokenizer: Tokenizer
) -> None:
    seed.make_run(alice, name="waits")
    tab.goto("/runs/")
    expect_live(tab)
    tab.get_by_label("Search runs").fill("half a wo")
    warning = tab.get_by_role("status").get_by_text("No GPU worker is running.")
    expect(warning).to_be_visible()
    worker = seed.make_worker()
    Worker.objects.filter(pk=worker.pk).update(fingerprint={seed.MODEL: {"torch": "2"}})
    expect(warning).to_have_count(0)
    Worker.objects.filter(pk=worker.pk).update(drain_asked_at=Now())
    expect(tab.get_by_role("status").get_by_text("those that have it are drained")).to_be_visible()
    BaseModel.objects.update(error="out of memory: 12 GB needed")
    expect(tab.get_by_role("status").get_by_text("out of memory: 12 GB needed")).to_be_visible()
    expect(tab.get_by_label("Search runs")).to_be_focused()
    expect(tab.get_by_label("Search runs")).to_have_value("half a wo")


def test_the_first_steps_say_when_a_base_model_is_loaded(tab: Page, alice: User, tmp_path: Path) -> None:
    tab.goto("/runs/")
    expect_live(tab)
    model = tab.locator('[data-part="models"] li')
    expect(model).to_contain_text("not loaded yet")
    seed.make_base_model(tmp_path)
    expect(model).not_to_contain_text("not loaded yet")
    expect(model).to_contain_text("loaded")


def test_a_run_of_a_later_page_that_trains_on_comes_back_to_the_top(tab: Page, alice: User) -> None:
    now = timezone.now()
    old = seed.make_run(alice, name="of page 2", created_at=now - timedelta(days=9))
    for number in range(PAGE_SIZE):
        seed.make_run(
            alice, name=f"idle {number}", session=old.session, created_at=now - timedelta(hours=number)
        )
    tab.goto("/runs/")
    expect_live(tab)
    rows = tab.locator("[data-run]")
    expect(rows).to_have_count(PAGE_SIZE)
    add_steps(old, range(1, 6))
    expect(rows.first).to_contain_text("of page 2")
    expect(rows).to_have_count(PAGE_SIZE + 1)
    expect(rows.nth(1)).to_contain_text("idle 0")


def test_a_run_without_code_tells_how_far_it_has_come_and_goes_on_telling(
    tab: Page, run: TrainingRun
) -> None:
    tab.goto("/runs/")
    expect_live(tab)
    step = tab.locator(f'[data-run="{run.public_id}"] .cell-step')
    expect(step).to_contain_text("60 / 400")
    expect(step).to_contain_text("min left")
    bar = step.get_by_role("progressbar", name="Progress of steered")
    expect(bar).to_have_js_property("value", 15)
    add_steps(run, range(61, 101))
    expect(step).to_contain_text("100 / 400")
    expect(bar).to_have_js_property("value", 25)


def test_what_is_chosen_is_counted_anew_when_it_is_deleted_elsewhere(tab: Page, alice: User) -> None:
    stays, goes = seed.make_run(alice, name="stays"), seed.make_run(alice, name="goes")
    tab.goto("/runs/")
    expect_live(tab)
    tab.get_by_role("button", name="Select").click()
    for run in (stays, goes):
        tab.get_by_label(f"Choose {run.name}").check()
    expect(tab.get_by_role("button", name="Delete 2 runs…")).to_be_visible()
    run_deletion.delete(goes)
    expect(tab.get_by_role("button", name="Delete 1 run…")).to_be_visible()
    run_deletion.delete(stays)
    expect(tab.get_by_role("button", name="Delete")).to_have_count(0)


def test_a_list_that_was_searched_stays_so_when_runs_are_deleted(tab: Page, alice: User) -> None:
    for name in ("red fox", "blue fox", "bear"):
        seed.make_run(alice, name=name)
    tab.goto("/runs/?q=fox&status=waiting+for+client")
    expect_live(tab)
    tab.get_by_role("button", name="Select").click()
    tab.get_by_label("Choose red fox").check()
    tab.get_by_role("button", name="Delete 1 run…").click()
    tab.get_by_role("button", name="Delete", exact=True).click()
    expect(tab.get_by_text("1 run was deleted.")).to_be_visible()
    expect(tab.get_by_label("Search runs")).to_have_value("fox")
    expect(tab.get_by_label("Status")).to_have_value("waiting for client")
    expect(tab.locator("[data-run]")).to_have_count(1)
    expect(tab.locator("[data-run]")).to_contain_text("blue fox")


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
