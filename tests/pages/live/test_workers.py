"""Draining a worker in a real browser: asked about, by keyboard, told as it goes on, and undone."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from django.db.models.functions import Now
from playwright.sync_api import Page, expect

from runs.models import TrainingRun, User, Worker
from tests.pages import seed
from tests.pages.live.browser import LIVE, shoot

pytestmark = LIVE


@pytest.fixture
def worker(alice: User, tmp_path: Path) -> Worker:
    """Let alice be an operator; return a worker with a run, and have ended ones below it."""
    User.objects.filter(pk=alice.pk).update(is_staff=True)
    Worker.objects.all().delete()
    seed.make_worker(is_alive=False)
    worker = seed.make_worker()
    seed.make_base_model(tmp_path, worker=worker)
    Worker.objects.filter(pk=worker.pk).update(fingerprint={seed.MODEL: {"torch": "2"}})
    run = seed.make_run(alice, worker=worker)
    seed.add_operations(run)
    return worker


def test_a_worker_is_drained_by_keyboard_and_resumed(tab: Page, worker: Worker) -> None:
    tab.clock.install()
    tab.clock.pause_at(datetime.now() + timedelta(minutes=1))  # noqa: DTZ005 - as the page has it
    tab.goto("/workers/")
    row = tab.locator(f'tr[data-key="{worker.pk}"]')
    expect(row.locator(".status")).to_have_text("alive")
    shoot(tab, "workers-alive")
    button = row.get_by_role("button", name="Drain worker")
    button.focus()
    tab.keyboard.press("Enter")
    dialog = tab.get_by_role("dialog", name="Drain this worker?")
    expect(dialog).to_contain_text("lets its run go")
    expect(dialog).to_contain_text("No other worker takes runs of mintweb/tiny. They wait")
    shoot(tab, "workers-question")
    tab.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert not Worker.objects.exclude(drain_asked_at=None).exists()

    tab.keyboard.press("Enter")
    dialog.get_by_role("button", name="Drain", exact=True).focus()
    tab.keyboard.press("Enter")
    expect(dialog).to_have_count(0)
    expect(row.locator(".status")).to_have_text("draining")
    shoot(tab, "workers-draining")
    TrainingRun.objects.filter(worker=worker).update(worker=None, free_since=Now())
    tab.clock.run_for(1_000)  # sooner than a page usually looks
    expect(row.locator(".status")).to_have_text("drained")
    expect(tab.get_by_text("1 run waits; nothing is lost.")).to_be_visible()
    shoot(tab, "workers-drained")

    row.get_by_role("button", name="Resume worker").focus()
    tab.keyboard.press("Enter")
    expect(row.locator(".status")).to_have_text("alive")
    expect(tab.get_by_text("1 run waits; nothing is lost.")).to_have_count(0)


def test_a_question_stays_open_while_the_page_goes_on_and_is_refused_in_words(
    tab: Page,
    worker: Worker,
) -> None:
    tab.clock.install()
    tab.goto("/workers/")
    row = tab.locator(f'tr[data-key="{worker.pk}"]')
    row.get_by_role("button", name="Drain worker").click()
    dialog = tab.get_by_role("dialog", name="Drain this worker?")
    Worker.objects.filter(pk=worker.pk).update(stopped_at=Now())
    tab.clock.fast_forward(6_000)
    expect(row.locator(".status")).to_have_text("ended")
    expect(dialog).to_be_visible()
    dialog.get_by_role("button", name="Drain", exact=True).click()
    expect(dialog.get_by_role("alert")).to_contain_text("has ended; only one that is alive is drained")
    dialog.get_by_role("button", name="Keep it working").click()
    tab.clock.fast_forward(6_000)
    expect(dialog).to_have_count(0)
