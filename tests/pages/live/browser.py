"""The browser of the tests, what its tabs watch for, and pictures of them."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LIVE = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
"""The marks of a file of tests here."""
WATCH = """
window.problems = [];
addEventListener("securitypolicyviolation", (event) => problems.push(`CSP: ${event.violatedDirective} ${event.blockedURI}`));
addEventListener("error", (event) => problems.push(`error: ${event.message}`));
addEventListener("unhandledrejection", (event) => problems.push(`rejection: ${event.reason}`));
window.alert = () => problems.push("a script from data ran");
requestAnimationFrame(function frame() {
  requestAnimationFrame(frame);
});
"""
# The browser itself says this when the server refuses what a form holds, which the page shows.
REFUSED = "status of 422"
# And this of a server that is gone, or goes while it answers; the page comes back from both.
AWAY = ("net::ERR_CONNECTION_", "net::ERR_EMPTY_RESPONSE", "before receiving a handshake response")
_PICTURES = os.environ.get("MINTWEB_SCREENSHOTS")


def shoot(tab: Page, name: str) -> None:
    """Take pictures for somebody to look at: both themes, desktop and phone."""
    if not _PICTURES:
        return
    for scheme in ("light", "dark"):
        for width in (1280, 390):
            tab.emulate_media(color_scheme=scheme)
            tab.set_viewport_size({"width": width, "height": 900})
            tab.screenshot(path=Path(_PICTURES) / f"{name}-{scheme}-{width}.png")


def module_address(tab: Page, name: str) -> str:
    """Return where a script is that the page in the tab could import, to try it by itself."""
    address = tab.locator('script[src*="/js/app."]').get_attribute("src") or ""
    return re.sub(r"app[^/]*\.js", name, address)
