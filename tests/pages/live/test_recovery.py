"""What happened to a run, in a real browser: it came back whole, it did not, a step was skipped, its client left."""

from __future__ import annotations

from pathlib import Path

import pytest
from django.db import transaction
from django.db.models.functions import Now
from playwright.sync_api import Page, expect

from runs import events
from runs.models import RunEvent, ServerClock, TrainingRun, User, Worker
from runs.services import holdups
from tests.pages import seed
from tests.pages.live.browser import LIVE, shoot
from tests.pages.live.run_page import open_run

pytestmark = LIVE


@pytest.fixture
def run(alice: User, tmp_path: Path) -> TrainingRun:
    worker = seed.make_worker()
    seed.make_base_model(tmp_path, worker=worker)
    run = seed.make_run(alice, name="disturbed", worker=worker)
    seed.add_values(run, seed.curve(400))
    return run


def note(run: TrainingRun, kind: str, step: int, **detail: object) -> None:
    with transaction.atomic():
        RunEvent.objects.create(run=run, seq=2 * step, step=step, kind=kind, detail=detail)
        events.run_changed(run.pk, run.owner_id, run.public_id)


def change(run: TrainingRun) -> None:
    with transaction.atomic():
        events.run_changed(run.pk, run.owner_id, run.public_id)


def test_marks_and_badge_tell_what_happened(tab: Page, run: TrainingRun) -> None:
    open_run(tab, run)
    expect(tab.get_by_role("status").filter(has_text="Live")).to_be_visible()
    note(run, "recovered", 100, from_seq=188, num_replayed=12, took_s=6.42)
    note(
        run,
        "recovered",
        180,
        from_seq=340,
        num_replayed=20,
        took_s=41.0,
        engine="torch 2.13.0 -> 2.14.0",
        largest_difference=0.000312,
    )
    note(run, "step_skipped", 250)
    note(
        run,
        "diverged",
        330,
        operation="forward_backward",
        seq=661,
        reason="its result is another one than before",
    )
    marks = tab.locator(".lane-mark")
    expect(marks).to_have_count(4)
    labels = [
        "recovered, nothing lost at step 100: replayed 12 operations; back after 6.4 s",
        "recovered, nothing lost at step 180: replayed 20 operations; back after 41.0 s; "
        "replayed on another engine torch 2.13.0 -> 2.14.0; largest difference 0.00031",
        "step skipped: gradient not finite at step 250",
        "diverged at step 330: operation 661 (forward_backward); because its result is another one than before",
    ]
    for index, label in enumerate(labels):
        expect(marks.nth(index)).to_have_attribute("aria-label", label)
    listed = tab.get_by_role("region", name="Events")
    expect(listed.locator(".event").first).to_contain_text("operation 661 (forward_backward)")
    expect(listed.get_by_text("recovered, nothing lost")).to_have_count(2)
    expect(tab.locator(".headline .chip-bad")).to_have_text("diverged")
    colors = [
        marks.nth(index).evaluate("(mark) => getComputedStyle(mark).backgroundColor") for index in (0, 3)
    ]
    radii = [marks.nth(index).evaluate("(mark) => getComputedStyle(mark).borderRadius") for index in (0, 3)]
    assert len(set(colors)) == len(set(radii)) == 2
    shoot(tab, "marks")


def test_a_run_whose_worker_is_late_says_why_it_waits(tab: Page, run: TrainingRun) -> None:
    seed.add_operations(run)
    open_run(tab, run)
    status = tab.locator(".headline-status .status")
    expect(status).to_have_text("running")
    Worker.objects.update(lease_until=Now())
    expect(status).to_have_text("waiting for worker")  # nobody told the page
    expect(tab.locator(".reason")).to_contain_text("no GPU worker is running")
    shoot(tab, "waiting")


def test_a_run_that_a_full_disk_holds_up_says_so_for_as_long(tab: Page, run: TrainingRun) -> None:
    open_run(tab, run)
    holdups.enter(run.pk, holdups.NO_ROOM_FOR_REQUEST)
    status = tab.locator(".headline-status .status")
    expect(status).to_have_text("held up")
    expect(tab.locator(".reason")).to_have_text(holdups.NO_ROOM_FOR_REQUEST)
    shoot(tab, "held-up")
    holdups.clear(run.pk, holdups.NO_ROOM_FOR_REQUEST)
    expect(tab.locator(".reason")).to_have_count(0)


def test_a_run_without_its_client_is_parked(tab: Page, run: TrainingRun) -> None:
    open_run(tab, run)
    TrainingRun.objects.filter(pk=run.pk).update(last_applied_at=None)
    change(run)
    status = tab.locator(".headline-status .status")
    expect(status).to_have_text("waiting for client")
    ServerClock.objects.update_or_create(pk=1, defaults={"uptime_s": 5000.0})
    change(run)
    expect(status).to_contain_text("parked: its client went away")
    shoot(tab, "parked")
