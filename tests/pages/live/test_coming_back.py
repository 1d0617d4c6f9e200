"""The Back button in a real browser: a page that is shown again is up to date, and keeps what was typed into it."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from runs.models import Checkpoint, Dataset, User
from tests.pages import recipe_seed, seed
from tests.pages.live.browser import LIVE
from tests.pages.live.new_run_page import choose, field
from tests.pages.new_run_form import NEW, make_dataset, ref

pytestmark = LIVE


@pytest.fixture(params=["from the cache", "as it was left"])
def way(tab: Page, request: pytest.FixtureRequest) -> str:
    """Return how the browser shows the page again: read anew from its cache, or with all that was in its memory."""
    tab.goto("/workers/")  # what a browser has in its cache holds for the cookies that it had then
    return str(request.param)


def go_away(tab: Page, way: str) -> None:
    if way == "from the cache":
        tab.goto("/workers/")


def come_back(tab: Page, way: str) -> None:
    if way == "from the cache":
        tab.go_back()
    else:  # Chromium under a debugger keeps no page in memory
        tab.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")


def test_the_list_of_datasets_has_their_new_names(tab: Page, alice: User, way: str) -> None:
    dataset = make_dataset(alice).dataset
    tab.goto("/datasets/")
    expect(tab.get_by_role("link", name="questions 1")).to_be_visible()
    go_away(tab, way)
    Dataset.objects.filter(pk=dataset.pk).update(name="renamed")
    come_back(tab, way)
    expect(tab.get_by_role("link", name="renamed")).to_be_visible()
    expect(tab.get_by_role("link", name="questions 1")).to_have_count(0)


def test_the_list_of_checkpoints_is_without_deleted_ones(tab: Page, alice: User, way: str) -> None:
    run = seed.make_run(alice)
    for step in (1, 2, 3):
        seed.add_checkpoint(run, f"step-{step}", step=step)
    tab.goto("/checkpoints/")
    tab.get_by_label("Choose step-3").check()
    go_away(tab, way)
    Checkpoint.objects.get(name="step-2").delete()
    come_back(tab, way)
    expect(tab.locator("tbody tr")).to_have_count(2)
    expect(tab.get_by_text("2 take")).to_be_visible()
    if way == "as it was left":
        expect(tab.get_by_role("button", name="Delete 1 chosen")).to_be_visible()
    Checkpoint.objects.all().delete()
    come_back(tab, "as it was left")
    expect(tab.get_by_text("No checkpoints yet.")).to_be_visible()


def test_a_dataset_that_was_uploaded_meanwhile_can_be_chosen(
    tab: Page, alice: User, tmp_path: Path, way: str
) -> None:
    seed.make_base_model(tmp_path / "tokenizer")
    tab.goto(NEW)
    expect(tab.get_by_text("None that can be trained on is ready yet.")).to_be_visible()
    field(tab, "Run name").fill("typed by hand")
    field(tab, "Another prompt").fill("Who are you?")
    go_away(tab, way)
    dataset = make_dataset(alice)
    come_back(tab, way)
    expect(tab.get_by_text("Only those that are ready")).to_be_visible()
    choose(tab, dataset)
    expect(field(tab, "Run name")).to_have_value("typed by hand")
    expect(tab.locator("textarea[name='samples.prompts']").first).to_have_value("Who are you?")
    validation = tab.locator("select[name='validation.datasets']")
    validation.select_option(ref(dataset))
    expect(validation).to_have_count(2)
    expect(validation.last.locator("option")).to_have_count(2)


def test_a_choice_that_is_offered_no_more_stays_chosen(tab: Page, alice: User, tmp_path: Path) -> None:
    seed.make_base_model(tmp_path / "tokenizer")
    dataset = make_dataset(alice)
    tab.goto(NEW)
    choose(tab, dataset)
    other = make_dataset(alice, number=2)
    dataset.dataset.delete()
    come_back(tab, "as it was left")
    expect(field(tab, "Dataset").locator(f"option[value='{ref(other)}']")).to_have_count(1)
    expect(field(tab, "Dataset").locator("option:checked")).to_contain_text("questions 1")
    expect(tab.locator('[data-field="dataset"] [data-error]')).to_contain_text(
        "There is no version 1 of dataset"
    )


def test_a_run_with_this_dataset_goes_on_with_what_was_typed(tab: Page, alice: User, tmp_path: Path) -> None:
    seed.make_base_model(tmp_path / "tokenizer")
    old, new = make_dataset(alice), make_dataset(alice, number=2)
    tab.goto(NEW)
    choose(tab, old)
    field(tab, "Batch size").fill("32")
    tab.goto(f"{NEW}?dataset={ref(new)}")
    expect(tab.get_by_text("What you had typed before is back.")).to_be_visible()
    expect(field(tab, "Batch size")).to_have_value("32")
    expect(field(tab, "Dataset")).to_have_value(ref(new))
    field(tab, "Run name").fill("typed by hand")
    choose(tab, old)  # after all
    tab.reload()
    expect(field(tab, "Run name")).to_have_value("typed by hand")
    expect(field(tab, "Dataset")).to_have_value(ref(old))
    tab.get_by_role("button", name="Discard draft").click()
    expect(field(tab, "Dataset")).to_have_value(ref(new))
    expect(field(tab, "Batch size")).to_have_value("8")


def test_the_draft_of_a_run_like_another_is_its_own(tab: Page, alice: User, tmp_path: Path) -> None:
    seed.make_base_model(tmp_path / "tokenizer")
    run = seed.make_run(alice, name="first")
    recipe_seed.make_recipe(run)
    tab.goto(NEW)
    field(tab, "Batch size").fill("32")
    tab.goto(f"{NEW}?from={run.public_id}")
    expect(tab.get_by_role("heading", name="Same as first")).to_be_visible()
    expect(field(tab, "Batch size")).not_to_have_value("32")
    expect(tab.get_by_text("What you had typed before is back.")).to_be_hidden()
