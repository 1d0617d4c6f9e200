"""How a run without code is getting on: its phase in words, how long it will take, what may be done to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from statistics import median
from typing import Final

from django.db import connection
from django.db.models import Exists, OuterRef, QuerySet

from runs.models import Checkpoint, Evaluation, FixedSample, Recipe, TrainingRun
from runs.services import base_models, recipe_rows
from runs.services.recipe_rows import State
from runs.services.recipes import ACTIONS

# Steps that the pace is taken from: all of them, and the newest few for a run that changes its pace.
_NEWEST: Final = 20
# A step that took so many times as long as usual had a pause before it, or no worker: that is not its pace.
_LONGEST: Final = 10
_TIMES = """
SELECT h.run_id, newest.recorded_at
FROM unnest(%s::bigint[], %s::bigint[]) AS h(run_id, first_step) CROSS JOIN LATERAL (
  SELECT m.seq, m.recorded_at FROM runs_metric m
  WHERE m.run_id = h.run_id AND m.name = 'loss' AND m.step > h.first_step ORDER BY m.seq DESC LIMIT %s
) newest ORDER BY h.run_id, newest.seq DESC
"""
_PHASES: Final = {
    State.FINISHING: "finishing: last validation, samples and checkpoint",
    State.STOPPING: "stopping: saving a last checkpoint",
    State.DISCARDING: "stopping: deleting the weights",
    State.FINISHED: "finished",
    State.STOPPED: "stopped",
    State.DISCARDED: "stopped, weights discarded",
}


@dataclass(frozen=True, kw_only=True)
class RecipeStatus:
    """What pages and REST show of a recipe.

    Args:
        step: optimizer steps done (not only submitted); `share` of the whole run.
        eta_low_s, eta_high_s: a range for the time left; None before the pace is known.
        position: place among the runs that wait for a slot, from 1; None when it does not wait.
        starts_in_s: about when a waiting run starts; None when nobody can tell.
    """

    state: str
    phase: str
    step: int
    num_steps: int
    share: float
    eta_low_s: float | None
    eta_high_s: float | None
    position: int | None
    starts_in_s: float | None
    allowed: frozenset[str]
    started_at: datetime | None
    ended_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class StepsLeft:
    """How many steps a run has left that began after `first_step`."""

    first_step: int
    left: int


def status_of(recipe: Recipe) -> RecipeStatus:
    """Return how the recipe is getting on."""
    run = recipe.run
    step = min(max(run.step, recipe.first_step), recipe.num_steps or run.step)
    low, high = _time_left(recipe, step)
    position = _position(recipe)
    return RecipeStatus(
        state=recipe.state,
        phase=_phase(recipe, step, position),
        step=step,
        num_steps=recipe.num_steps,
        share=step / recipe.num_steps if recipe.num_steps else 0.0,
        eta_low_s=low,
        eta_high_s=high,
        position=position,
        starts_in_s=_starts_in(position) if position is not None else None,
        allowed=frozenset(name for name, states in ACTIONS.items() if recipe.state in states),
        started_at=recipe.started_at,
        ended_at=recipe.ended_at,
    )


def evaluations_of(run: TrainingRun) -> QuerySet[Evaluation]:
    """Return the run's evaluations; `is_saved` says of each whether a training checkpoint of its step is there."""
    saved = Checkpoint.objects.filter(
        run=OuterRef("run"), step=OuterRef("step"), kind=Checkpoint.Kind.TRAINING, is_ephemeral=False
    )
    return Evaluation.objects.filter(run=run).annotate(is_saved=Exists(saved))


def fixed_samples_of(run: TrainingRun) -> QuerySet[FixedSample]:
    """Return the run's samples of its fixed prompts with their operations; those of the base model have no step."""
    return FixedSample.objects.filter(run=run).select_related("operation").order_by("step", "id")


def times_left(runs: Mapping[int, StepsLeft]) -> dict[int, tuple[float, float]]:
    """Return the time left in seconds as a range: the steps left at the run's pace so far and at its newest pace.

    By the run's number, with one query for all; a run whose pace is not known yet, or that has no steps left, is
    left out.
    """
    asked = {pk: steps for pk, steps in runs.items() if steps.left > 0}
    if not asked:
        return {}
    times: dict[int, list[datetime]] = defaultdict(list)
    with connection.cursor() as cursor:
        first_steps = [steps.first_step for steps in asked.values()]
        cursor.execute(_TIMES, [list(asked), first_steps, 10 * _NEWEST])
        for pk, recorded_at in cursor.fetchall():
            times[pk].append(recorded_at)
    ranges = {pk: _range_s(times[pk], steps.left) for pk, steps in asked.items()}
    return {pk: found for pk, found in ranges.items() if found is not None}


def queue_length() -> int:
    """Return how many runs wait for a slot."""
    return Recipe.objects.filter(state=State.QUEUED).count()


def outlook() -> tuple[int, float | None]:
    """Return where in the queue a run started now would stand, 0 for no wait, and about when it would start.

    The time is None when nobody can tell.
    """
    position = queue_length() + 1
    if position == 1 and recipe_rows.has_free_slot():
        return 0, 0.0
    return position, _starts_in(position)


def _phase(recipe: Recipe, step: int, position: int | None) -> str:
    state = State(recipe.state)
    if state == State.FAILED:
        return f"failed: {recipe.error}"
    if state == State.PREPARING:
        info = base_models.find(recipe.run.base_model)
        if info is None or not info.is_loaded:
            return f"waiting until base model {recipe.run.base_model} is loaded"
        return f"reading the dataset: {recipe.progress:.0%}"
    if state == State.QUEUED:
        return f"queued, position {position}" if position and not recipe_rows.has_free_slot() else "starting"
    if state == State.PAUSED:
        return f"paused at step {step}"
    if state == State.RUNNING:
        return f"training: step {step} of {recipe.num_steps}"
    return _PHASES[state]


def _position(recipe: Recipe) -> int | None:
    if recipe.state != State.QUEUED:
        return None
    waiting = Recipe.objects.filter(state=State.QUEUED, queued_at__lt=recipe.queued_at)
    return waiting.count() + 1


def _starts_in(position: int) -> float | None:
    """Return when the waiting run at a position starts: as many runs must end before, the soonest first."""
    if recipe_rows.has_free_slot():
        return 0.0
    running = recipe_rows.holding_a_slot().select_related("run")
    ends = sorted(high for one in running if (high := _time_left(one, one.run.step)[1]) is not None)
    return ends[position - 1] if position <= len(ends) else None


def _time_left(recipe: Recipe, step: int) -> tuple[float | None, float | None]:
    if recipe.state not in (State.RUNNING, State.PAUSED):
        return None, None
    left = StepsLeft(first_step=recipe.first_step, left=recipe.num_steps - step)
    return times_left({recipe.run_id: left}).get(recipe.run_id, (None, None))


def _range_s(times: Sequence[datetime], num_steps: int) -> tuple[float, float] | None:
    if len(times) < 3:
        return None
    gaps_s = _gaps(times)
    paces_s = [sum(some) / len(some) for some in (gaps_s, gaps_s[: _NEWEST - 1])]
    return 0.9 * num_steps * min(paces_s), 1.1 * num_steps * max(paces_s)


def _gaps(times: Sequence[datetime]) -> list[float]:
    """Return the seconds between steps, given newest first; a pause counts as a slow step.

    Steps that are entered together have no gap between them, so the usual gap is the median of the others.
    """
    gaps_s = [(after - before).total_seconds() for after, before in pairwise(times)]
    longest_s = _LONGEST * median([gap for gap in gaps_s if gap > 0] or [0.0])
    return [min(gap, longest_s) for gap in gaps_s]
