"""Problems of the form of a new run in a real browser: said at their fields, and gone with their causes."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from runs.models import DatasetVersion, TrainingRun
from tests.pages.live.browser import LIVE
from tests.pages.live.new_run_page import card, choose, error_at, field
from tests.pages.live.server import Server
from tests.pages.new_run_form import NEW

pytestmark = [*LIVE, pytest.mark.usefixtures("form_base_model")]


def test_an_error_is_shown_at_its_field_and_goes_away_with_its_cause(
    tab: Page,
    dataset: DatasetVersion,
) -> None:
    tab.goto(NEW)
    choose(tab, dataset)
    rank = field(tab, "LoRA rank")
    rank.fill("4000")
    expect(error_at(tab, "lora.rank")).to_have_text("Must be less than or equal to 1024, got '4000'.")
    expect(rank).to_have_attribute("aria-invalid", "true")
    expect(rank).to_be_focused()
    rank.fill("8")
    expect(error_at(tab, "lora.rank")).to_be_hidden()
    expect(rank).not_to_have_attribute("aria-invalid", "true")
    field(tab, "Another prompt").fill("Who are you?")
    field(tab, "Another prompt").fill("Who are you?")
    expect(error_at(tab, "samples.prompts")).to_have_text("Is the same as another prompt.")
    expect(tab.locator("textarea[name='samples.prompts']").nth(1)).to_have_attribute("aria-invalid", "true")


def test_a_refused_start_leads_to_the_first_field_and_keeps_everything(
    tab: Page,
    dataset: DatasetVersion,
) -> None:
    tab.goto(NEW)
    field(tab, "Run name").fill("kept")
    tab.get_by_text("More settings").click()
    field(tab, "Warm-up").fill("7")
    tab.get_by_text("More settings").click()
    tab.get_by_role("button", name="Start the run").click()
    expect(tab.get_by_role("alert")).to_contain_text("2 things are wrong")
    expect(tab.get_by_role("alert")).to_contain_text("Dataset: choose one")
    expect(field(tab, "Dataset")).to_be_focused()
    choose(tab, dataset)
    tab.keyboard.press("Control+Enter")
    expect(tab.get_by_role("alert")).to_contain_text("Warm-up: must be less than or equal to 1, got '7'")
    expect(field(tab, "Warm-up")).to_be_focused()  # its fold is open again
    expect(field(tab, "Warm-up")).to_have_value("7")
    expect(field(tab, "Run name")).to_have_value("kept")
    tab.locator('[data-field="warmup_share"]').get_by_role("button", name="Reset").click()
    expect(field(tab, "Warm-up")).to_have_value("0.03")
    tab.keyboard.press("Control+Enter")
    tab.wait_for_url("**/runs/**:train:*/")
    assert TrainingRun.objects.get().name == "kept"


def test_the_box_of_a_refused_start_follows_what_is_put_right(tab: Page, dataset: DatasetVersion) -> None:
    tab.goto(NEW)
    field(tab, "LoRA rank").fill("4000")
    tab.get_by_role("button", name="Start the run").click()
    alert = tab.get_by_role("alert")
    expect(alert).to_contain_text("2 things are wrong")
    choose(tab, dataset)
    expect(alert).to_have_text(
        re.compile(
            r"^\s*The run cannot start like this:\s*LoRA rank: must be less than or equal to 1024, got '4000'\s*$"
        )
    )
    field(tab, "LoRA rank").fill("8")
    expect(alert).to_be_hidden()
    field(tab, "LoRA rank").fill("9000")
    expect(error_at(tab, "lora.rank")).to_be_visible()
    expect(alert).to_be_hidden()  # it speaks of a start


def test_a_discarded_draft_takes_its_problems_along(tab: Page, dataset: DatasetVersion) -> None:
    tab.goto(NEW)
    field(tab, "LoRA rank").fill("4000")
    tab.reload()
    tab.get_by_role("button", name="Start the run").click()
    expect(tab.get_by_role("alert")).to_contain_text("2 things are wrong")
    tab.get_by_role("button", name="Discard draft").click()
    expect(tab.get_by_role("alert")).to_be_hidden()
    expect(error_at(tab, "lora.rank")).to_be_hidden()
    expect(error_at(tab, "dataset")).to_be_hidden()


def test_a_refusal_that_the_preview_knows_nothing_of_stays_until_something_is_changed(
    tab: Page,
    server: Server,
    dataset: DatasetVersion,
) -> None:
    tab.clock.install()
    tab.goto(NEW)
    choose(tab, dataset)
    expect(card(tab, "Steps")).to_contain_text("143")
    server.refused = ("status of 503",)
    tab.route(
        re.compile(r"/runs/new/$"),
        lambda route: route.fulfill(status=503, json={"detail": "the disk is full"}),
    )
    tab.get_by_role("button", name="Start the run").click()
    alert = tab.get_by_role("alert")
    expect(alert).to_contain_text("The disk is full.")
    with tab.expect_response("**/preview"):
        tab.clock.run_for(15_000)
    tab.wait_for_timeout(200)
    expect(alert).to_be_visible()
    field(tab, "Batch size").fill("16")
    tab.clock.run_for(300)
    expect(alert).to_be_hidden()


def test_the_card_says_why_it_is_not_up_to_date(tab: Page, server: Server, dataset: DatasetVersion) -> None:
    tab.goto(NEW)
    choose(tab, dataset)
    expect(card(tab, "Steps")).to_contain_text("143")
    server.refused = ("status of 500", "status of 404", "ERR_FAILED")
    problem = tab.locator("[data-preview-problem]")
    for fail, words in (
        (lambda route: route.fulfill(status=500, body="oops"), "Not up to date: the server answered 500."),
        (lambda route: route.abort(), "Not up to date: the server cannot be reached."),
        (
            lambda route: route.fulfill(status=404, json={"detail": "there is no such checkpoint"}),
            "Not up to date: there is no such checkpoint.",
        ),
    ):
        tab.route("**/preview", fail)
        field(tab, "Batch size").fill("16")
        expect(problem).to_have_text(words)
        expect(tab.locator("[data-summary]")).to_have_text(words)  # on a phone the card is out of sight
        tab.unroute("**/preview")
    field(tab, "Batch size").fill("32")
    expect(card(tab, "Steps")).to_contain_text("36")
    expect(problem).to_be_hidden()


def test_a_field_that_is_wrong_is_described_by_what_is_wrong(tab: Page, dataset: DatasetVersion) -> None:
    tab.goto(NEW)
    field(tab, "LoRA rank").fill("4000")
    field(tab, "Another prompt").fill("Who are you?")
    field(tab, "Another prompt").fill("Who are you?")
    field(tab, "Steps").fill("none")
    tab.get_by_role("button", name="Start the run").click()
    expect(tab.get_by_role("alert")).to_contain_text("4 things are wrong")
    expect(tab.get_by_role("alert")).to_contain_text("How long: must be a valid integer, got 'none'")
    expect(field(tab, "LoRA rank")).to_have_accessible_description(
        re.compile("^Must be less than or equal to 1024, got '4000'. ")
    )
    expect(field(tab, "Dataset")).to_have_accessible_description(
        re.compile("^Choose one. Only those that are")
    )
    expect(field(tab, "Steps")).to_have_accessible_description(re.compile("^Must be a valid integer"))
    prompts = tab.locator("textarea[name='samples.prompts']")
    expect(prompts.nth(1)).to_have_accessible_description("Is the same as another prompt.")
    for index in (0, 2):
        expect(prompts.nth(index)).to_have_accessible_description("")
    choose(tab, dataset)
    field(tab, "LoRA rank").fill("8")
    prompts.nth(1).fill("And who am I?")
    field(tab, "Steps").fill("40")
    expect(tab.get_by_role("alert")).to_be_hidden()
    expect(field(tab, "LoRA rank")).to_have_accessible_description(re.compile("^How much"))
    expect(field(tab, "Dataset")).to_have_accessible_description(re.compile("^Only those that are"))
    expect(prompts.nth(1)).to_have_accessible_description("")
    expect(field(tab, "Base model")).to_have_accessible_description(re.compile("^Stays frozen"))
    expect(field(tab, "Run name")).to_have_accessible_description("So that you find it again.")
