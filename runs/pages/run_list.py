"""The start page: all runs of a person, those that did something last first."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final
from urllib.parse import urlencode

from django.conf import settings
from django.contrib import messages
from django.core import signing
from django.db.models import Q, QuerySet
from django.db.models.functions import Coalesce
from django.http import HttpRequest, HttpResponseBase, QueryDict
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_POST

from runs.exceptions import RequestInvalid
from runs.models import TrainingRun, User
from runs.pages import deletions
from runs.pages.policies import signed_in
from runs.services import access, base_models, keys, run_deletion, run_rows, training_runs, workers
from runs.services.run_rows import MAX_WATCHED_ROWS, Place
from runs.services.training_runs import DisplayState

PAGE_SIZE: Final = 50
# Runs that a search or filter goes through at once: there is no index for what it looks for.
SEARCH_SPAN: Final = 10_000
# Of what an address says; a cursor has half of it.
_LONGEST: Final = 200
_CURSOR_SALT: Final = "run-list"


@signed_in
@require_GET
def home(request: HttpRequest) -> HttpResponseBase:
    """Go to the runs."""
    return redirect("run-list")


@signed_in
@require_GET
def run_list(request: HttpRequest) -> HttpResponseBase:
    """Show a page of runs, searched and filtered by the address."""
    user: User = request.user  # type: ignore[assignment]
    search = request.GET.get("q", "").replace("\0", "").strip()[:_LONGEST]
    status = request.GET.get("status", "")
    runs = run_rows.by_activity(user)
    is_first_page = "after" not in request.GET
    if not is_first_page:
        runs = _after(runs, request.GET["after"])
    is_filtered = bool(search or status)
    end = _end_of_span(runs) if is_filtered else None
    found = list(_filtered(_until(runs, end) if end else runs, search, status)[: PAGE_SIZE + 1])
    place = run_rows.place_of(found[PAGE_SIZE - 1]) if len(found) > PAGE_SIZE else end
    context = {
        "rows": run_rows.rows_of(found[:PAGE_SIZE]),
        "search": search,
        "status": status,
        "statuses": [(state.value, state.value) for state in DisplayState],
        "is_filtered": is_filtered,
        "is_live": is_first_page and not is_filtered,
        "next_query": _next_query(request, place) if place else "",
        "num_searched": SEARCH_SPAN if place and place == end else 0,
        "is_first_page": is_first_page,
        "query": list(_query(request.GET).items()),
        "models": base_models.available(),
        "outlook": workers.outlook(),
    }
    if not found and not is_filtered and is_first_page:
        context.update(_first_steps(request, user))
    return render(request, "runs/run_list.html", context)


@signed_in
@require_POST
def delete_many(request: HttpRequest) -> HttpResponseBase:
    """Delete the chosen runs with all that they left; one that cannot be deleted now is kept and named.

    The list may show some that were deleted elsewhere meanwhile; they keep no others. It comes back as it was searched.
    """
    user: User = request.user  # type: ignore[assignment]
    wanted = set(request.POST.getlist("run")[:MAX_WATCHED_ROWS])
    chosen = list(access.runs_of(user).filter(public_id__in=wanted))
    kept: list[str] = []
    for run in chosen:
        try:
            run_deletion.delete(run)
        except RequestInvalid as error:
            kept.append(f"{run_rows.title_of(run)} was kept: {error.message}")
    deletions.tell(request, "run", num_deleted=len(chosen) - len(kept), num_gone=len(wanted) - len(chosen))
    for reason in kept:
        messages.warning(request, f"{reason}.")
    query = urlencode(_query(request.POST))
    return redirect(f"{reverse('run-list')}?{query}" if query else "run-list")


def base_url(request: HttpRequest) -> str:
    """Return the address that SDK clients use for this server."""
    return settings.PUBLIC_URL or request.build_absolute_uri("/").rstrip("/")


def _filtered(runs: QuerySet[TrainingRun], search: str, status: str) -> QuerySet[TrainingRun]:
    if search:
        runs = runs.filter(
            Q(name__icontains=search) | Q(public_id__icontains=search) | Q(base_model__icontains=search)
        )
    if status in {state.value for state in DisplayState}:
        runs = training_runs.in_display_state(runs, DisplayState(status))
    return runs


def _end_of_span(runs: QuerySet[TrainingRun]) -> Place | None:
    """Return the place of the last run that is searched at once; None where that is all of them."""
    places = runs.values_list(Coalesce("last_applied_at", "created_at"), "pk")
    ends = list(places[SEARCH_SPAN - 1 : SEARCH_SPAN + 1])
    return ends[0] if len(ends) > 1 else None


def _until(runs: QuerySet[TrainingRun], end: Place) -> QuerySet[TrainingRun]:
    active_at, pk = end
    return runs.filter(Q(active_at__gt=active_at) | Q(pk__gte=pk), Q(active_at__gte=active_at))


def _after(runs: QuerySet[TrainingRun], cursor: str) -> QuerySet[TrainingRun]:
    try:
        moment, pk = signing.loads(cursor, salt=_CURSOR_SALT)
    except signing.BadSignature:
        return runs
    active_at = datetime.fromisoformat(moment)
    # The first condition alone lets the database enter its index there.
    return runs.filter(Q(active_at__lt=active_at) | Q(pk__lt=pk), Q(active_at__lte=active_at))


def _next_query(request: HttpRequest, place: Place) -> str:
    active_at, pk = place
    cursor = signing.dumps([active_at.isoformat(), pk], salt=_CURSOR_SALT)
    return urlencode({**_query(request.GET), "after": cursor})


def _query(data: QueryDict) -> dict[str, str]:
    """Return what an address or a form says of which page of the list it is, in the words of the list's address."""
    return {name: value[:_LONGEST] for name in ("q", "status", "after") if (value := data.get(name))}


def _first_steps(request: HttpRequest, user: User) -> dict[str, Any]:
    loaded = [model for model in base_models.available() if model.is_loaded]
    return {
        "base_url": base_url(request),
        "snippet_model": (loaded or base_models.available())[0].name,
        "has_key": keys.has_live_key(user),
    }
