"""Several runs side by side: a column each, and what they came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from urllib.parse import urlencode

from runs.models import Recipe, TrainingRun
from runs.services import run_rows, training_runs
from runs.services.comparisons import Validation
from runs.services.training_runs import DisplayState
from runs.templatetags.formats import count, decimal, duration

# Colours and dashes of the lines are in `static/css/compare.css`; both repeat, never the two together.
NUM_COLORS: Final = 8
NUM_DASHES: Final = 5
_OVER: Final = (DisplayState.CLOSED, DisplayState.STOPPED, DisplayState.FAILED)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A run at the head of its column and in the legend.

    `line` are the classes that give its line's look; `without` is the query of the page without this run.
    """

    run_id: str
    title: str
    line: str
    without: str
    status: str
    tone: str
    is_over: bool
    has_diverged: bool
    last_seq: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the runs came to in one respect: for each a value, and a note that may be empty."""

    name: str
    hint: str
    cells: list[tuple[str, str]]


def columns_of(runs: Sequence[TrainingRun]) -> list[Column]:
    """Return the columns of runs from `comparisons.chosen`."""
    run_ids = [run.public_id for run in runs]
    return [
        _column(run, place, without=query_of([one for one in run_ids if one != run.public_id]))
        for place, run in enumerate(runs)
    ]


def query_of(run_ids: Sequence[str]) -> str:
    """Return the part of an address that names these runs."""
    return urlencode([("run", run_id) for run_id in run_ids])


def began_at(run: TrainingRun) -> datetime:
    """Return when the run began to train: a run without code may have waited for its turn before."""
    recipe: Recipe | None = getattr(run, "recipe", None)
    return run.created_at if recipe is None or recipe.started_at is None else recipe.started_at


def results_of(runs: Sequence[TrainingRun], validations: Mapping[int, Validation]) -> list[Result]:
    """Return how far the runs have come and how good they are."""
    measured = [validations.get(run.pk) for run in runs]
    return [
        _result("Step", [(count(run.step), _planned(run)) for run in runs]),
        _result("Tokens", [(count(run.num_tokens), "") for run in runs]),
        _result(
            "Duration",
            [(duration(_duration_s(run)), "") for run in runs],
            hint="from the beginning of training to the last step, pauses and waits included",
        ),
        _result("Last loss per token", [(decimal(run.loss), "") for run in runs]),
        _result("Last validation loss", [(decimal(one.last if one else None), "") for one in measured]),
        _result("Lowest validation loss", [_lowest(one) for one in measured]),
    ]


def _result(name: str, cells: list[tuple[str, str]], *, hint: str = "") -> Result:
    return Result(name=name, hint=hint, cells=cells)


def _column(run: TrainingRun, place: int, *, without: str) -> Column:
    state = training_runs.display_state(run)
    has_diverged: bool = run.has_diverged  # type: ignore[attr-defined]
    last_seq: int | None = run.last_seq  # type: ignore[attr-defined]
    color, dash = place % NUM_COLORS + 1, (place + place // NUM_COLORS) % NUM_DASHES + 1
    return Column(
        run_id=run.public_id,
        title=run_rows.title_of(run),
        line=f"run-color-{color} run-dash-{dash}",
        without=without,
        status=state.value,
        tone="bad" if has_diverged else run_rows.tone_of(state),
        is_over=state in _OVER,
        has_diverged=has_diverged,
        last_seq=-1 if last_seq is None else last_seq,
    )


def _planned(run: TrainingRun) -> str:
    recipe: Recipe | None = getattr(run, "recipe", None)
    return f"of {count(recipe.num_steps)}" if recipe is not None and recipe.num_steps else ""


def _duration_s(run: TrainingRun) -> float | None:
    if run.last_applied_at is None:
        return None
    return max((run.last_applied_at - began_at(run)).total_seconds(), 0.0)


def _lowest(validation: Validation | None) -> tuple[str, str]:
    if validation is None or validation.lowest is None:
        return decimal(None), ""
    return decimal(validation.lowest), f"step {count(validation.lowest_step)}"
