"""The page of a run in a browser: what changes the run, and what its page shows then."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from django.db import transaction
from playwright.sync_api import Page, expect

from runs import events
from runs.models import Metric, TrainingRun
from tests.pages import recipe_seed, seed

PROMPT = "Where does the bear sleep?"


def add_steps(
    run: TrainingRun, steps: Sequence[int], *, step_s: float = 1.0, ends_at: datetime | None = None
) -> None:
    values = [
        (2 * step, step, {"loss": 2 / step, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_s": 5e3})
        for step in steps
    ]
    with transaction.atomic():
        seed.add_values(run, values, step_s=step_s, ends_at=ends_at)
        events.run_changed(run.pk, run.owner_id, run.public_id)


def steps(run: TrainingRun, numbers: Sequence[int], *, first_seq: int, loss: float) -> None:
    rows = [(first_seq + index, step, {"loss": loss, "tokens": 100.0}) for index, step in enumerate(numbers)]
    with transaction.atomic():
        seed.add_values(run, rows)
        events.run_changed(run.pk, run.owner_id, run.public_id)


def note(run: TrainingRun, kind: str, step: int, **detail: Any) -> None:
    with transaction.atomic():
        recipe_seed.add_event(run, kind, step, **detail)
        events.run_changed(run.pk, run.owner_id, run.public_id)


def open_run(tab: Page, run: TrainingRun) -> None:
    tab.goto(f"/runs/{quote(run.public_id)}/")


def expect_live(tab: Page) -> None:
    expect(tab.get_by_role("status").filter(has_text="Live")).to_be_visible()


def expect_values(tab: Page, run: TrainingRun) -> None:
    """Wait until the page holds exactly what is stored, and check every step of one chart."""
    number = Metric.objects.filter(run=run).count()
    grid = tab.locator("[data-chart-grid]")
    expect(grid).to_have_attribute("data-num-values", str(number))
    stored = set(Metric.objects.filter(run=run).values_list("name", flat=True))
    for name in stored:
        expected = str(Metric.objects.filter(run=run, name=name).count())
        expect(tab.locator(f'[data-metric="{name}"]')).to_have_attribute("data-num-values", expected)


def shown_steps(tab: Page) -> list[int]:
    """Return the steps of the loss chart's table, oldest first."""
    table = tab.locator('[data-metric="loss"]')
    if table.locator("table").count() == 0:
        table.get_by_role("button", name="Table").click()
    cells = table.locator("tbody tr td:first-child").all_text_contents()
    return [int(cell.replace("\u202f", "")) for cell in reversed(cells)]
