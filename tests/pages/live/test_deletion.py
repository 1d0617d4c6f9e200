"""Deleting runs and checkpoints in a real browser: what is chosen is counted, kept over live updates, and asked about."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from runs import events
from runs.models import Checkpoint, Operation, TrainingRun, User
from tests.pages import seed
from tests.pages.live.browser import LIVE
from tests.pages.live.run_page import open_run

pytestmark = LIVE


def test_a_run_is_deleted_from_its_page(tab: Page, alice: User) -> None:
    run = seed.make_run(alice, name="old")
    seed.add_operations(run, num_done=2, num_queued=1)
    open_run(tab, run)
    tab.get_by_role("button", name="Delete…", exact=True).click()
    dialog = tab.get_by_role("dialog", name="Delete this run?")
    expect(dialog).to_contain_text("cannot delete a run with 1 unfinished operation")
    expect(dialog.get_by_role("button", name="Delete run")).to_have_count(0)
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_be_hidden()

    Operation.objects.filter(run=run, state="queued").delete()
    tab.reload()
    tab.get_by_role("button", name="Delete…", exact=True).click()
    dialog.get_by_role("button", name="Delete run").click()
    expect(tab.get_by_text("The run old was deleted.")).to_be_visible()
    assert not TrainingRun.objects.exists()


def test_runs_are_chosen_in_the_list_while_it_changes(tab: Page, alice: User) -> None:
    first, second, third = (seed.make_run(alice, name=name) for name in ("first", "second", "third"))
    tab.goto("/runs/")
    expect(tab.locator("[data-live-state]")).to_have_attribute("data-state", "live")
    box = tab.get_by_role("checkbox", name="Choose first")
    expect(box).to_be_hidden()
    tab.get_by_role("button", name="Select").click()
    box.check()
    tab.get_by_role("checkbox", name="Choose second").check()
    TrainingRun.objects.filter(pk=first.pk).update(step=77)
    events.run_changed(first.pk, alice.pk, first.public_id)
    expect(tab.locator(f'[data-run="{first.public_id}"] .cell-step')).to_have_text("77")
    expect(box).to_be_checked()
    tab.get_by_role("button", name="Delete 2 runs…").click()
    tab.get_by_role("button", name="Delete", exact=True).click()
    expect(tab.get_by_text("2 runs were deleted.")).to_be_visible()
    assert list(TrainingRun.objects.all()) == [third]
    assert second.pk != third.pk


def test_checkpoints_are_counted_before_they_go(tab: Page, alice: User) -> None:
    run = seed.make_run(alice, name="saved")
    for number in range(3):
        seed.add_checkpoint(run, f"step-{number}", step=number)
    tab.goto("/checkpoints/")
    tab.get_by_role("checkbox", name="Choose all").check()
    tab.get_by_role("checkbox", name="Choose step-1").uncheck()
    tab.get_by_role("button", name="Delete 2 chosen…").click()
    expect(tab.get_by_text("Delete 2 checkpoints (84.0 MB) with the files?")).to_be_visible()
    tab.get_by_role("button", name="Delete", exact=True).click()
    expect(tab.get_by_text("2 checkpoints were deleted.")).to_be_visible()
    assert Checkpoint.objects.get().name == "step-1"
