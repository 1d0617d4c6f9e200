"""Runs side by side: `?run=ID&run=ID...` draws their curves into one chart each and lays their settings out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from django.http import HttpRequest, HttpResponseBase
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET

from runs.exceptions import NotFound, RequestInvalid
from runs.models import TrainingRun, User
from runs.pages import compared_settings, comparison
from runs.pages.compared_settings import Group
from runs.pages.comparison import Column
from runs.pages.policies import signed_in
from runs.services import compared_exports, comparisons, run_rows
from runs.services.compared_exports import Exported
from runs.services.comparisons import MAX_RUNS
from runs.streams import streamed

NUM_OFFERED: Final = 30
_SHOWN_OF_ID: Final = 128


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A run that can be chosen."""

    run_id: str
    title: str
    base_model: str
    is_chosen: bool


@signed_in
@require_GET
def compare(request: HttpRequest) -> HttpResponseBase:
    """Show the runs that the address names; what it names in vain is said, and the rest compared."""
    user: User = request.user  # type: ignore[assignment]
    run_ids = _run_ids(request)
    runs = comparisons.chosen(user, run_ids)
    found = {run.public_id for run in runs}
    missing = [run_id[:_SHOWN_OF_ID] for run_id in run_ids if run_id not in found]
    context = {"missing": missing, "max_runs": MAX_RUNS, "offers": _offers(user, runs)}
    if len(runs) < 2:
        context["num_chosen"] = len(runs)
        return render(request, "runs/compare_choice.html", context, status=404 if missing else 200)
    return render(request, "runs/compare.html", {**context, **_side_by_side(runs), "lines": _lines(runs)})


@signed_in
@never_cache
@require_GET
def panels(request: HttpRequest) -> HttpResponseBase:
    """Return the parts of the page that change while a run trains; the settings only if the page has others.

    Raises:
        NotFound: one of the runs is gone, so that its column must go, too.
    """
    user: User = request.user  # type: ignore[assignment]
    context = _side_by_side(_all_chosen(user, _run_ids(request)))
    context["has_settings"] = request.GET.get("settings") == context["settings_version"]
    return render(request, "runs/_compare_panels.html", context)


@signed_in
@require_GET
def as_csv(request: HttpRequest) -> HttpResponseBase:
    """Return every stored value of the runs as one CSV file.

    Raises:
        NotFound: one of the runs is gone; a file without it would look complete.
    """
    user: User = request.user  # type: ignore[assignment]
    runs = _all_chosen(user, _run_ids(request))
    names = comparisons.names_of(runs)
    parts = compared_exports.as_csv([_exported(run, names[run.pk]) for run in runs])
    number = f"{len(runs)}-runs" if len(runs) > 1 else "1-run"
    return streamed(parts, content_type="text/csv; charset=utf-8", filename=f"compare-{number}.csv")


def _all_chosen(user: User, run_ids: Sequence[str]) -> list[TrainingRun]:
    runs = comparisons.chosen(user, run_ids)
    if not runs or len(runs) < len(run_ids):
        raise NotFound("one of these training runs is no longer there")
    return runs


def _exported(run: TrainingRun, names: Sequence[str]) -> Exported:
    last_seq: int | None = run.last_seq  # type: ignore[attr-defined]
    return Exported(
        run=run,
        title=run_rows.title_of(run),
        began_at=comparison.began_at(run),
        last_seq=-1 if last_seq is None else last_seq,
        names=names,
    )


def _run_ids(request: HttpRequest) -> list[str]:
    run_ids = list(dict.fromkeys(run_id for run_id in request.GET.getlist("run") if run_id))
    if len(run_ids) > MAX_RUNS:
        raise RequestInvalid(
            f"at most {MAX_RUNS} runs can be compared at once, got {len(run_ids)}", place="run"
        )
    return run_ids


def _side_by_side(runs: Sequence[TrainingRun]) -> dict[str, Any]:
    columns = comparison.columns_of(runs)
    groups = compared_settings.groups_of(runs)
    states = [{"seq": column.last_seq, "isOver": column.is_over} for column in columns]
    return {
        "columns": columns,
        "query": comparison.query_of([column.run_id for column in columns]),
        "results": comparison.results_of(runs, comparisons.validations_of(runs)),
        "groups": groups,
        "is_same": all(group.is_same for group in groups),
        "settings_version": _version_of(columns, groups),
        "states": json.dumps(states),
    }


def _lines(runs: Sequence[TrainingRun]) -> list[dict[str, Any]]:
    """Return what the charts need of each run before they ask for its values."""
    names = comparisons.names_of(runs)
    return [
        {
            "id": run.public_id,
            "title": run_rows.title_of(run),
            "startsAt": comparison.began_at(run).timestamp(),
            "names": names[run.pk],
        }
        for run in runs
    ]


def _offers(user: User, chosen: Sequence[TrainingRun]) -> list[Offer]:
    """Return the chosen runs and the latest others."""
    known = {run.pk for run in chosen}
    others = [run for run in comparisons.latest(user, limit=NUM_OFFERED) if run.pk not in known]
    return [
        Offer(
            run_id=run.public_id,
            title=run_rows.title_of(run),
            base_model=run.base_model,
            is_chosen=run.pk in known,
        )
        for run in (*chosen, *others)
    ]


def _version_of(columns: Sequence[Column], groups: Sequence[Group]) -> str:
    shown = repr((groups, [column.title for column in columns]))
    return hashlib.sha256(shown.encode()).hexdigest()[:16]
