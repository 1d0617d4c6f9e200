"""How far a run without code has come, as the head of its page shows it: every value ready to be read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from runs.models import Metric, Recipe, TrainingRun
from runs.services import recipe_rows, recipe_status, training_runs
from runs.services.recipe_status import RecipeStatus, StepsLeft
from runs.services.training_runs import DisplayState

State = Recipe.State
_TONES: Final = {
    State.PREPARING: "busy",
    State.QUEUED: "busy",
    State.RUNNING: "good",
    State.PAUSED: "warn",
    State.FINISHING: "good",
    State.STOPPING: "warn",
    State.DISCARDING: "warn",
    State.FINISHED: "done",
    State.STOPPED: "done",
    State.DISCARDED: "done",
    State.FAILED: "bad",
}
_HELD_UP: Final = (DisplayState.WAITING_FOR_WORKER, DisplayState.HELD_UP)
_UNITS: Final = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))
_VALIDATION_LOSS: Final = "validation_loss"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Phase and progress in words and numbers.

    Args:
        percent: of the bar; None while nobody can tell (a queue, a model being loaded).
        time_left: a range in words, or nothing before the pace is known.
        best_step: of the checkpoint with the lowest validation loss.
    """

    status: RecipeStatus
    phase: str
    tone: str
    percent: int | None
    is_over: bool
    step: int
    num_steps: int
    time_left: str
    validation_loss: float | None
    best_loss: float | None
    best_step: int | None
    dataset_id: str
    dataset_name: str
    dataset_number: int
    error: str


@dataclass(frozen=True, kw_only=True)
class RowProgress:
    """What a list shows of it; `percent` is None, which is no bar, once the run is over."""

    step: int
    num_steps: int
    percent: int | None
    time_left: str


def progress_of(run: TrainingRun, recipe: Recipe, shown: DisplayState) -> Progress:
    """Return how far the recipe has come; `shown` is what lists say of its run."""
    status = recipe_status.status_of(recipe)
    version = recipe.dataset_version
    return Progress(
        status=status,
        phase=_capitalised(_phase(status, shown)),
        tone="warn" if shown in _HELD_UP else _TONES[State(recipe.state)],
        percent=_percent(recipe, status),
        is_over=status.ended_at is not None,
        step=status.step,
        num_steps=status.num_steps,
        time_left=_time_left(status),
        validation_loss=_loss(run, None),
        best_loss=None if recipe.best_step is None else _loss(run, recipe.best_step),
        best_step=recipe.best_step,
        dataset_id=version.dataset.public_id,
        dataset_name=version.dataset.name,
        dataset_number=version.number,
        error=recipe.error,
    )


def progress_of_rows(runs: Iterable[TrainingRun]) -> dict[int, RowProgress]:
    """Return how far runs without code have come, by the run's number; the runs come from `run_rows.by_activity`.

    Those of clients, and those whose number of steps is not known yet, are left out. One query for all the runs that
    train now, which alone tell how long it will take.
    """
    known = [run for run in runs if run.recipe_num_steps]  # type: ignore[attr-defined]
    left_s = recipe_status.times_left({run.pk: _steps_left(run) for run in known if _is_training(run)})
    return {run.pk: _row_progress(run, left_s.get(run.pk)) for run in known}


def _row_progress(run: TrainingRun, left_s: tuple[float, float] | None) -> RowProgress:
    num_steps, left = run.recipe_num_steps, _steps_left(run).left  # type: ignore[attr-defined]
    is_over = run.recipe_state in recipe_rows.ENDED  # type: ignore[attr-defined]
    return RowProgress(
        step=num_steps - left,
        num_steps=num_steps,
        percent=None if is_over else 100 * (num_steps - left) // num_steps,
        time_left=f"{time_range(*left_s)} left" if left_s else "",
    )


def _steps_left(run: TrainingRun) -> StepsLeft:
    first, last = run.recipe_first_step, run.recipe_num_steps  # type: ignore[attr-defined]
    return StepsLeft(first_step=first, left=last - min(max(run.step, first), last))


def _is_training(run: TrainingRun) -> bool:
    is_running = run.recipe_state == State.RUNNING  # type: ignore[attr-defined]
    return is_running and training_runs.display_state(run) == DisplayState.RUNNING


def about(seconds: float) -> str:
    """Return a duration as a person would say it: about 4 min."""
    return f"about {_in_unit(seconds, *_unit(seconds))}"


def time_range(low_s: float, high_s: float) -> str:
    """Return a range of durations in one unit: 4 to 6 min."""
    length, unit = _unit(high_s)
    low, high = _in_unit(low_s, length, unit), _in_unit(high_s, length, unit)
    return f"about {high}" if low == high else f"{low.partition(' ')[0]} to {high}"


def _phase(status: RecipeStatus, shown: DisplayState) -> str:
    if shown == DisplayState.WAITING_FOR_WORKER:
        return f"waiting for a GPU worker, {status.phase}"
    if shown == DisplayState.HELD_UP:
        return f"held up, {status.phase}"
    if status.state == State.FAILED:
        return f"failed at step {status.step}"
    if status.position is not None and status.starts_in_s:
        return f"{status.phase}, starts in {about(status.starts_in_s)}"
    return status.phase


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _percent(recipe: Recipe, status: RecipeStatus) -> int | None:
    if recipe.state == State.PREPARING:
        return int(100 * recipe.progress)
    if recipe.state == State.QUEUED and status.step <= recipe.first_step:
        return None
    return int(100 * status.share)


def _time_left(status: RecipeStatus) -> str:
    if status.eta_low_s is None or status.eta_high_s is None:
        return ""
    left = time_range(status.eta_low_s, status.eta_high_s)
    return f"{left} of training left" if status.state == State.PAUSED else f"{left} left"


def _unit(seconds: float) -> tuple[float, str]:
    return next((unit for unit in _UNITS if seconds >= 1.5 * unit[0]), (1.0, "s"))


def _in_unit(seconds: float, length: float, unit: str) -> str:
    value = seconds / length
    is_fine = length > 60.0 and value < 10
    return f"{value:.1f} {unit}" if is_fine else f"{max(math.ceil(value), 1)} {unit}"


def _loss(run: TrainingRun, step: int | None) -> float | None:
    rows = Metric.objects.filter(run=run, name=_VALIDATION_LOSS)
    if step is not None:
        rows = rows.filter(step=step)
    return rows.order_by("-seq").values_list("value", flat=True).first()
