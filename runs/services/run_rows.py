"""A run as lists and pages show it: every value ready, so that a template decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeAlias

from django.db.models import F, QuerySet
from django.db.models.functions import Coalesce

from runs.models import TrainingRun, User
from runs.services import access, recipe_facts, sparklines, training_runs, waiting
from runs.services.recipe_facts import Progress, RowProgress
from runs.services.sparklines import Sparkline
from runs.services.training_runs import DisplayState

MAX_WATCHED_ROWS: Final = 200
"""The most rows that an open list of runs shows and hears of."""
WIDTH: Final = 120
HEIGHT: Final = 28
_PADDING: Final = 2.0
Place: TypeAlias = tuple[datetime, int]
"""Where a run stands in a list: when it last did something, and its number."""
_TONES: Final = {
    DisplayState.RUNNING: "good",
    DisplayState.STOPPING: "warn",
    DisplayState.QUEUED: "busy",
    DisplayState.PREPARING: "busy",
    DisplayState.PAUSED: "warn",
    DisplayState.RECOVERING: "warn",
    DisplayState.HELD_UP: "warn",
    DisplayState.STOPPED: "done",
    DisplayState.WAITING_FOR_WORKER: "warn",
    DisplayState.WAITING_FOR_CLIENT: "idle",
    DisplayState.PARKED: "idle",
    DisplayState.CLOSED: "done",
    DisplayState.FAILED: "bad",
}
_GIVES_REASON: Final = (DisplayState.WAITING_FOR_WORKER, DisplayState.QUEUED)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A sparkline as the attributes of SVG shapes, and in words."""

    line: str
    band: str
    summary: str


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """What a list shows of one run; `progress` is that of a run that needs no code."""

    run_id: str
    title: str
    is_named: bool
    status: str
    tone: str
    has_diverged: bool
    source: str
    source_label: str
    base_model: str
    step: int
    progress: RowProgress | None
    loss: float | None
    tokens_per_s: float | None
    created_at: datetime
    error: str
    curve: Curve | None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the head of a run's page shows; `progress` is that of a run that needs no code.

    `reason` says why waiting operations do not go on.
    """

    row: RunRow
    progress: Progress | None
    reason: str
    rank: int
    alpha: float
    seed: int
    trained_parts: str
    num_tokens: int
    session_id: str
    sdk_version: str
    user_metadata: dict[str, str]
    last_applied_at: datetime | None


def by_activity(user: User) -> QuerySet[TrainingRun]:
    """Return the user's runs, those that last did something first, with all that `rows_of` needs."""
    runs = training_runs.with_activity(access.runs_of(user)).annotate(
        recipe_num_steps=F("recipe__num_steps"), recipe_first_step=F("recipe__first_step")
    )
    return runs.annotate(active_at=Coalesce("last_applied_at", "created_at")).order_by("-active_at", "-pk")


def place_of(run: TrainingRun) -> Place:
    """Return where a run from `by_activity` stands; the first of a list has the highest."""
    active_at: datetime = run.active_at  # type: ignore[attr-defined]
    return active_at, run.pk


def rows_of(runs: Iterable[TrainingRun]) -> list[RunRow]:
    """Return the rows of runs that come from `by_activity`; one query for all their curves, one for all their paces."""
    listed = list(runs)
    lines = sparklines.of_runs(listed)
    progress = recipe_facts.progress_of_rows(listed)
    return [_row(run, lines[run.pk], progress.get(run.pk)) for run in listed]


def with_facts(user: User) -> QuerySet[TrainingRun]:
    """Return the user's runs with all that the head of a page needs."""
    runs = training_runs.with_activity(access.runs_of(user))
    return runs.select_related("session", "parent", "recipe__dataset_version__dataset").defer(
        "recipe__dataset_version__report"
    )


def facts_of(run: TrainingRun) -> RunFacts:
    """Return the head of a run's page; the run comes from `with_facts`."""
    recipe = getattr(run, "recipe", None)
    shown = training_runs.display_state(run)
    return RunFacts(
        row=_row(run, None, None),
        progress=None if recipe is None else recipe_facts.progress_of(run, recipe, shown),
        reason=_reason(run, shown),
        rank=run.lora_rank,
        alpha=run.lora_alpha,
        seed=run.lora_seed,
        trained_parts=parts_of(run),
        num_tokens=run.num_tokens,
        session_id=run.session.public_id,
        sdk_version=run.session.sdk_version,
        user_metadata={str(key): str(value) for key, value in run.user_metadata.items()},
        last_applied_at=run.last_applied_at,
    )


def _reason(run: TrainingRun, shown: DisplayState) -> str:
    if run.is_held_up:  # type: ignore[attr-defined]
        return run.held_up
    return waiting.reason_of_run(run) if shown in _GIVES_REASON else ""


def title_of(run: TrainingRun) -> str:
    """Return the run's name, or a short form of its id."""
    session, _, number = run.public_id.partition(":train:")
    return run.name or f"{session[:8]}-{number}"


def parts_of(run: TrainingRun) -> str:
    """Return which parts of the model the run's adapter is on."""
    parts = {"attention": run.train_attn, "MLP": run.train_mlp, "unembedding": run.train_unembed}
    return ", ".join(part for part, is_trained in parts.items() if is_trained)


def tone_of(state: DisplayState) -> str:
    """Return the colour group of a state."""
    return _TONES[state]


def _row(run: TrainingRun, line: Sparkline | None, progress: RowProgress | None) -> RunRow:
    state = training_runs.display_state(run)
    is_running = state == DisplayState.RUNNING
    return RunRow(
        run_id=run.public_id,
        title=title_of(run),
        is_named=bool(run.name),
        status=_words(run, state),
        tone="bad" if run.has_diverged else tone_of(state),  # type: ignore[attr-defined]
        has_diverged=run.has_diverged,  # type: ignore[attr-defined]
        source=run.source,
        source_label=TrainingRun.Source(run.source).label,
        base_model=run.base_model,
        step=run.step if progress is None else progress.step,
        progress=progress,
        loss=run.loss,
        tokens_per_s=run.tokens_per_s if is_running else None,
        created_at=run.created_at,
        error=run.error,
        curve=curve_of(line) if line else None,
    )


def _words(run: TrainingRun, state: DisplayState) -> str:
    if state == DisplayState.RECOVERING:
        return f"recovering: replaying {run.num_replayed} of {run.num_to_replay} operations"
    if state == DisplayState.PARKED:
        seen_at: datetime = run.client_seen_at  # type: ignore[attr-defined]
        return f"parked: its client went away {_clock(seen_at)}"
    return state.value


def _clock(moment: datetime) -> str:
    is_today = moment.date() == datetime.now(moment.tzinfo).date()
    return moment.strftime("%H:%M UTC" if is_today else "%d %b %H:%M UTC")


def curve_of(line: Sparkline) -> Curve | None:
    """Return the shapes of a loss curve: the means as a line, the extremes as a band."""
    buckets = sorted(line.buckets.items())
    if len(buckets) < 2:
        return None
    first, last = buckets[0][0], buckets[-1][0]
    bottom = min(bucket.low for _, bucket in buckets)
    top = max(bucket.high for _, bucket in buckets)
    span = (top - bottom) or 1.0

    def point(number: int, value: float) -> str:
        x = WIDTH * (number - first) / (last - first)
        y = _PADDING + (HEIGHT - 2 * _PADDING) * (1.0 - (value - bottom) / span)
        return f"{x:.1f},{y:.1f}"

    highs = [point(number, bucket.high) for number, bucket in buckets]
    lows = [point(number, bucket.low) for number, bucket in reversed(buckets)]
    return Curve(
        line=" ".join(point(number, bucket.mean) for number, bucket in buckets),
        band=" ".join(highs + lows),
        summary=f"loss from {buckets[0][1].mean:.4g} to {buckets[-1][1].mean:.4g}, lowest {bottom:.4g}",
    )
