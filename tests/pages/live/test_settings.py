"""Settings in a real browser: a key is made once, however often its button is pressed or its answer loaded again."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from runs.models import ApiKey, User
from tests.pages.live.browser import LIVE

pytestmark = LIVE


@pytest.mark.parametrize("address", ["/settings/", "/runs/"])
def test_a_key_is_made_once(tab: Page, alice: User, address: str) -> None:
    tab.goto(address)
    if address == "/settings/":
        tab.get_by_label("Name of the new key").fill("first key")
    tab.get_by_role("button", name="Create").dblclick()
    expect(tab.get_by_text("MINT_API_KEY=sk-mint-")).to_be_visible()
    assert ApiKey.objects.count() == 1
    tab.reload()
    expect(tab.get_by_text("Key first key was already created")).to_be_visible()
    expect(tab.get_by_text("MINT_API_KEY=sk-mint-")).to_have_count(0)
    assert ApiKey.objects.count() == 1
    tab.get_by_label("Name of the new key").fill("another")
    tab.get_by_role("button", name="Create").click()
    expect(tab.get_by_text("MINT_API_KEY=sk-mint-")).to_be_visible()
    assert ApiKey.objects.count() == 2
