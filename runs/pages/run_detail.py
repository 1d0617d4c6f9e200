"""One run: its head, steering, charts, film strip, latest samples, checkpoints, operations and events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from django.contrib import messages
from django.db.models import Count, Q, Sum
from django.http import HttpRequest, HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from runs.exceptions import RequestInvalid
from runs.models import Checkpoint, Operation, Recipe, TrainingRun, User
from runs.pages import checkpoints, film_strip, lineage, playground, run_events, sample_texts, steering
from runs.pages.policies import signed_in
from runs.services import (
    access,
    metrics,
    operations,
    run_deletion,
    run_rows,
    run_versions,
    sampling,
    training_runs,
)
from runs.services.run_rows import RunFacts

NUM_SAMPLES: Final = 8
# Looked through for the latest samples; most of the rest only asked for log-probabilities.
_NUM_SAMPLES_READ: Final = 24
_TONES: Final = {"queued": "busy", "done": "done", "failed": "bad"}


@dataclass(frozen=True, kw_only=True)
class OperationRow:
    """What the page shows of an operation."""

    seq: int
    kind: str
    state: str
    tone: str
    num_tokens: int
    wait_s: float | None
    run_s: float | None
    created_at: datetime
    error: str
    error_category: str
    attempts: int


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """What deleting the run takes away; `obstacle` says why it cannot be deleted now."""

    num_checkpoints: int
    size_bytes: int
    obstacle: str


@signed_in
@require_GET
def run_detail(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Show the run's page."""
    panels = _panels(request, run_id)
    run: TrainingRun = panels["run"]
    is_large = metrics.is_large(run)
    recipe = getattr(run, "recipe", None)
    context = {
        **panels,
        "title": run_rows.title_of(run),
        "talk": playground.talk_of_run(run, panels["checkpoints"]),
        "chart_settings": {
            "runId": run.public_id,
            "isLarge": is_large,
            "upToSeq": metrics.last_seq(run) if is_large else -1,
            "names": metrics.names(run) if is_large else [],
        },
    }
    if recipe is not None:
        num_columns = film_strip.num_columns_of(request)
        context["strip"] = film_strip.strip_of(run, recipe.config, num_columns=num_columns)
    return render(request, "runs/run_detail.html", context)


@signed_in
@require_GET
def panels(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Return the parts of the page that change beside the charts; the checkpoints only if the page has others."""
    context = _panels(request, run_id)
    context["has_checkpoints"] = request.GET.get("checkpoints") == context["checkpoints_version"]
    return render(request, "runs/_panels.html", context)


@signed_in
@require_POST
def delete(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Delete the run with all that it left."""
    user: User = request.user  # type: ignore[assignment]
    run = access.get_run(user, run_id)
    try:
        run_deletion.delete(run)
    except RequestInvalid as error:
        messages.error(request, f"{error.message[0].upper()}{error.message[1:]}.")
        return redirect("run-detail", run_id=run.public_id)
    messages.success(request, f"The run {run_rows.title_of(run)} was deleted.")
    return redirect("run-list")


@signed_in
@require_POST
def rename(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Give the run a name."""
    user: User = request.user  # type: ignore[assignment]
    run = access.get_run(user, run_id)
    name = "".join(character for character in request.POST.get("name", "") if character.isprintable()).strip()
    training_runs.rename(run, name)
    messages.success(request, "The run was renamed." if name else "The run's name was removed.")
    return redirect("run-detail", run_id=run.public_id)


def _panels(request: HttpRequest, run_id: str) -> dict[str, Any]:
    user: User = request.user  # type: ignore[assignment]
    pk = access.get_run(user, run_id).pk
    # Before what it is the version of: a change in between is read once too often, not missed.
    version = run_versions.version_of(pk)
    run = run_rows.with_facts(user).get(pk=pk)
    samples = sampling.samples_of(run, limit=_NUM_SAMPLES_READ)
    events = run_events.rows_of(run)
    recipe = getattr(run, "recipe", None)
    facts = run_rows.facts_of(run)
    saved = checkpoints.rows_of_run(run, limit=checkpoints.NUM_OF_RUN)
    taken = _taken_by(run)
    return {
        "run": run,
        "version": version,
        "facts": facts,
        "samples": sample_texts.texts_of(samples, base_model=run.base_model)[:NUM_SAMPLES],
        "checkpoints": saved,
        "checkpoints_version": checkpoints.version_of(saved, taken["num_named"]),
        "num_all_checkpoints": taken["num_named"] if taken["num_named"] > len(saved) else 0,
        "operations": [
            _operation_row(row) for row in operations.latest_of(run, limit=run_versions.NUM_OPERATIONS)
        ],
        "events": events[: run_events.NUM_SHOWN],
        "older_events": events[run_events.NUM_SHOWN :],
        "marks": run_events.marks_of(events, best_step=None if recipe is None else recipe.best_step),
        "lineage": lineage.lineage_of(run),
        "steering": _steering(recipe, facts, saved, num_checkpoints=taken["num_named"]),
        "deletion": Deletion(
            num_checkpoints=taken["num"],
            size_bytes=taken["size_bytes"],
            obstacle=run_deletion.obstacle_to_deletion(run, recipe),
        ),
        "strip_version": "" if recipe is None else film_strip.version_of(run),
    }


def _taken_by(run: TrainingRun) -> dict[str, int]:
    """Return how many checkpoints the run has, those too that no table shows, and what they take."""
    return Checkpoint.objects.filter(run=run).aggregate(
        num=Count("pk"),
        num_named=Count("pk", filter=Q(is_ephemeral=False)),
        size_bytes=Sum("size_bytes", default=0),
    )


def _steering(
    recipe: Recipe | None,
    facts: RunFacts,
    saved: Sequence[checkpoints.CheckpointRow],
    *,
    num_checkpoints: int,
) -> steering.Steering | None:
    if recipe is None or facts.progress is None:
        return None
    return steering.steering_of(recipe, facts.progress.status, saved, num_checkpoints=num_checkpoints)


def _operation_row(row: Operation) -> OperationRow:
    is_over = row.finished_at is not None and row.started_at is not None
    return OperationRow(
        seq=row.seq,
        kind=row.kind,
        state=row.state,
        tone=_TONES[row.state],
        num_tokens=row.num_tokens,
        wait_s=(row.started_at - row.created_at).total_seconds() if row.started_at else None,
        run_s=(row.finished_at - row.started_at).total_seconds() if is_over else None,  # type: ignore[operator]
        created_at=row.created_at,
        error=row.error,
        error_category=row.error_category,
        attempts=row.attempts,
    )
