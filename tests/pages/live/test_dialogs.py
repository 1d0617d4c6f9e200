"""Dialogs in a real browser: only a press beside one closes it, and what was typed into it is not lost by that."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

from runs.models import Recipe, TrainingRun, User
from tests.pages.dataset_seed import add_checked, chats
from tests.pages.live.browser import LIVE
from tests.pages.live.run_page import expect_live, open_run

pytestmark = LIVE
OUTSIDE = (5, 5)


def drag_out_of(tab: Page, field: Locator) -> None:
    """Select the text of a field from its end to beyond the dialog."""
    box = field.bounding_box()
    assert box is not None
    tab.mouse.move(box["x"] + box["width"] - 5, box["y"] + box["height"] / 2)
    tab.mouse.down()
    tab.mouse.move(*OUTSIDE, steps=4)
    tab.mouse.up()


def test_a_selection_that_ends_beside_a_dialog_leaves_it_open(tab: Page, run: TrainingRun) -> None:
    open_run(tab, run)
    expect_live(tab)
    tab.get_by_role("button", name="Change settings").click()
    dialog = tab.get_by_role("dialog", name="Change settings")
    prompt = dialog.get_by_label("A new prompt")
    prompt.fill("What does the owl say?")
    drag_out_of(tab, prompt)
    assert tab.evaluate("getSelection().toString()") == "What does the owl say?"
    expect(dialog).to_be_visible()
    expect(prompt).to_have_value("What does the owl say?")


def test_what_was_typed_is_there_again_until_it_is_cancelled_or_sent(tab: Page, run: TrainingRun) -> None:
    open_run(tab, run)
    expect_live(tab)
    button = tab.get_by_role("button", name="Change settings")
    dialog = tab.get_by_role("dialog", name="Change settings")
    rate = dialog.get_by_label("Learning rate")
    button.click()
    started_with = rate.input_value()
    rate.fill("0.0005")
    tab.mouse.click(*OUTSIDE)
    expect(dialog).to_be_hidden()
    button.click()
    expect(rate).to_have_value("0.0005")
    tab.keyboard.press("Escape")
    button.click()
    expect(rate).to_have_value("0.0005")
    dialog.get_by_role("button", name="Cancel").click()
    button.click()
    expect(rate).to_have_value(started_with)
    rate.fill("5e-4")
    dialog.get_by_role("button", name="Change", exact=True).click()
    expect(dialog).to_be_hidden()
    expect(tab.locator("[data-part=recipe-settings]")).to_contain_text("1 changed while it trained")
    assert Recipe.objects.get(run=run).config["learning_rate"] == 5e-4
    button.click()
    expect(rate).to_have_value("0.0005")


def test_the_dialogs_of_a_dataset_are_the_same(tab: Page, alice: User) -> None:
    version = add_checked(alice, chats(3), name="sums")
    tab.goto(f"/datasets/{version.dataset.public_id}/")
    tab.get_by_role("button", name="Edit").click()
    dialog = tab.get_by_role("dialog", name="Edit dataset")
    name = dialog.get_by_label("Name")
    name.fill("sums of two numbers")
    drag_out_of(tab, name)
    expect(dialog).to_be_visible()
    tab.mouse.click(*OUTSIDE)
    expect(dialog).to_be_hidden()
    tab.get_by_role("button", name="Edit").click()
    expect(name).to_have_value("sums of two numbers")
    dialog.get_by_role("button", name="Cancel").click()
    tab.get_by_role("button", name="Edit").click()
    expect(name).to_have_value("sums")
