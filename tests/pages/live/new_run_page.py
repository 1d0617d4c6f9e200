"""The form of a new run in a browser."""

from __future__ import annotations

from playwright.sync_api import Locator, Page

from runs.models import DatasetVersion
from tests.pages.new_run_form import ref


def card(tab: Page, label: str) -> Locator:
    return tab.locator(".preview-line").filter(has=tab.locator("dt", has_text=label)).locator("dd")


def field(tab: Page, label: str) -> Locator:
    return tab.get_by_label(label, exact=True)


def choose(tab: Page, dataset: DatasetVersion) -> None:
    field(tab, "Dataset").select_option(ref(dataset))


def error_at(tab: Page, place: str) -> Locator:
    return tab.locator(f'[data-field="{place}"] [data-error]')
