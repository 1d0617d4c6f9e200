"""Copying in a browser that gives scripts no clipboard, as over plain http to another machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from runs.models import User
from tests.pages import seed
from tests.pages.live.browser import LIVE
from tests.pages.live.new_run_page import choose
from tests.pages.live.run_page import open_run
from tests.pages.new_run_form import NEW, make_dataset, ref

pytestmark = LIVE
NO_CLIPBOARD = "Clipboard.prototype.writeText = () => Promise.reject(new Error('not here'));"


@pytest.fixture
def plain(tab: Page) -> Page:
    """Return the tab without a clipboard to write to; a test may read it."""
    tab.add_init_script(NO_CLIPBOARD)
    tab.context.grant_permissions(["clipboard-read"])
    return tab


def clipboard(tab: Page) -> str:
    text: str = tab.evaluate("navigator.clipboard.readText()")
    return text


def test_copy_in_a_dialog_copies(plain: Page, alice: User, tmp_path: Path) -> None:
    seed.make_base_model(tmp_path / "tokenizer")
    dataset = make_dataset(alice)
    plain.goto(NEW)
    choose(plain, dataset)
    plain.get_by_role("button", name="Export").click()
    dialog = plain.get_by_role("dialog", name="This run as text")
    copy = dialog.locator(".copy-button")
    copy.click()
    expect(copy).to_have_text("Copied")
    text = clipboard(plain)
    assert f"dataset: {ref(dataset)}\n" in text
    assert text == dialog.locator("#export-text").inner_text().strip()
    expect(copy).to_be_focused()
    expect(dialog).to_be_visible()
    assert plain.locator("textarea.visually-hidden").count() == 0


def test_copy_keeps_the_focus_and_says_when_it_failed(plain: Page, alice: User) -> None:
    open_run(plain, seed.make_run(alice))
    copy = plain.locator("[data-copy-view]")
    copy.focus()
    plain.keyboard.press("Enter")
    expect(copy).to_have_text("Copied")
    assert clipboard(plain) == plain.url
    expect(copy).to_be_focused()
    expect(copy).to_have_text("Copy link")
    plain.evaluate("document.execCommand = () => false")
    copy.click()
    expect(copy).to_have_text("Copy failed: select the text and press Ctrl+C")
    expect(copy).to_have_text("Copy link")
