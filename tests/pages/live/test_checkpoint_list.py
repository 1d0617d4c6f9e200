"""The list of checkpoints in a real browser: pages and filters are kept by what is done there, and by coming back."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from runs.models import Checkpoint, TrainingRun, User
from runs.pages.checkpoint_list import PAGE_SIZE
from tests.pages import seed
from tests.pages.live.browser import LIVE

pytestmark = LIVE


@pytest.fixture
def run(alice: User) -> TrainingRun:
    """Return a run with two checkpoints more than a page of sampler weights, and one of training."""
    run = seed.make_run(alice, name="saves each step")
    Checkpoint.objects.bulk_create(
        Checkpoint(
            owner=alice,
            run=run,
            kind="sampler_weights",
            name=f"step-{step:04d}",
            directory=f"checkpoints/{run.pk}/{step}",
            size_bytes=10**6,
            seq=step,
            step=step,
        )
        for step in range(PAGE_SIZE + 2)
    )
    seed.add_checkpoint(run, "final")
    return run


def test_what_is_deleted_on_a_filtered_page_leads_back_to_it(tab: Page, run: TrainingRun) -> None:
    tab.goto(f"/checkpoints/?run={quote(run.public_id)}")
    for label, choice in (("Kind", "sampler"), ("Order", "Oldest first")):
        with tab.expect_navigation():  # until its scripts are there, too
            tab.get_by_label(label).select_option(choice)
    expect(tab).to_have_url(re.compile("kind=sampler_weights&sort=oldest"))
    tab.get_by_role("link", name="Newer checkpoints").click()
    expect(tab.locator("tbody tr")).to_have_count(2)
    address = tab.url
    tab.get_by_role("checkbox", name="Choose all").check()
    tab.get_by_role("checkbox", name=f"Choose step-{PAGE_SIZE:04d}").uncheck()
    tab.get_by_role("button", name="Delete 1 chosen…").click()
    tab.get_by_role("button", name="Delete", exact=True).click()
    expect(tab.get_by_text("1 checkpoint was deleted.")).to_be_visible()
    expect(tab).to_have_url(address)
    expect(tab.locator("tbody tr")).to_have_count(1)
    expect(tab.get_by_label("Kind")).to_have_value("sampler_weights")

    tab.get_by_role("button", name="More for").click()
    tab.get_by_role("button", name="Delete", exact=True).click()
    expect(tab.get_by_text("There are no further checkpoints.")).to_be_visible()
    tab.get_by_role("link", name="First page").click()
    expect(tab.locator("tbody tr")).to_have_count(PAGE_SIZE)


def test_coming_back_to_a_page_brings_that_page_up_to_date(tab: Page, run: TrainingRun) -> None:
    tab.goto(f"/checkpoints/?q={run.name.split()[0]}&kind=sampler_weights&sort=oldest")
    tab.get_by_role("link", name="Newer checkpoints").click()
    first, second = (f"step-{PAGE_SIZE + number:04d}" for number in range(2))
    tab.get_by_label(f"Choose {second}").check()
    Checkpoint.objects.filter(name=first).delete()
    tab.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
    expect(tab.locator("tbody tr")).to_have_count(1)
    expect(tab.get_by_label(f"Choose {second}")).to_be_checked()
    expect(tab.get_by_role("button", name="Delete 1 chosen…")).to_be_visible()
    expect(tab.get_by_role("link", name="First page")).to_be_visible()
