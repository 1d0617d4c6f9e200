"""The numbers behind a run's charts: values after a cursor, buckets of a long past, a CSV of everything."""

from __future__ import annotations

import math
from typing import Final, overload

import orjson
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET

from runs.exceptions import RequestInvalid
from runs.models import TrainingRun, User
from runs.pages.policies import signed_in
from runs.services import access, histories, metric_exports, metrics
from runs.streams import streamed

MAX_NAMES: Final = 32
_PAGE_VALUES: Final = 10_000


@signed_in
@never_cache
@require_GET
def values(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Return the values after a cursor, `{"points", "cursor", "more"}`, in the order of seq."""
    run = _run(request, run_id)
    after = _whole(request, "after", default=-1)
    points = metrics.points_after(run, after, limit=_PAGE_VALUES)
    cursor = points[-1].seq if points else after
    # A page is cut at the end of an operation, so a little below its limit.
    is_cut = 2 * len(points) >= _PAGE_VALUES
    content = {"points": [point.as_json() for point in points], "cursor": cursor, "more": is_cut}
    return JsonResponse(content)


@signed_in
@never_cache
@require_GET
def series(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Return the past up to a cursor in buckets, `{"series": [...]}`, one for each name."""
    run = _run(request, run_id)
    names = request.GET.getlist("name")[:MAX_NAMES] or metrics.names(run)[:MAX_NAMES]
    try:
        weight = float(request.GET.get("weight", "0"))
    except ValueError:
        weight = math.nan
    if not 0 <= weight < 1:
        raise RequestInvalid("must be at least 0 and below 1", place="weight")
    up_to_seq = _whole(request, "up_to", default=None)
    if up_to_seq is None:
        up_to_seq = metrics.last_seq(run)
    found = [
        histories.history(
            run,
            name,
            num_buckets=min(max(_whole(request, "buckets", default=1000), 1), histories.MAX_BUCKETS),
            weight=weight,
            up_to_seq=up_to_seq,
            from_step=_whole(request, "from", default=None),
            to_step=_whole(request, "to", default=None),
        )
        for name in names
    ]
    return HttpResponse(orjson.dumps({"series": found}), content_type="application/json")


@signed_in
@require_GET
def as_csv(request: HttpRequest, run_id: str) -> HttpResponseBase:
    """Return every stored value as CSV, or those of one metric."""
    run = _run(request, run_id)
    name = request.GET.get("name", "")
    parts = metric_exports.as_csv(metric_exports.pages(run, name=name))
    session, _, number = run.public_id.partition(":train:")
    filename = f"metrics-{session[:8]}-{number}.csv"
    return streamed(parts, content_type="text/csv; charset=utf-8", filename=filename)


def _run(request: HttpRequest, run_id: str) -> TrainingRun:
    user: User = request.user  # type: ignore[assignment]
    return access.get_run(user, run_id)


@overload
def _whole(request: HttpRequest, name: str, *, default: int) -> int: ...
@overload
def _whole(request: HttpRequest, name: str, *, default: None) -> int | None: ...
def _whole(request: HttpRequest, name: str, *, default: int | None) -> int | None:
    text = request.GET.get(name)
    if text is None:
        return default
    try:
        number = int(text[:20])
    except ValueError:
        raise RequestInvalid(f"must be a whole number, got {text[:20]!r}", place=name) from None
    return min(max(number, -1), 2**62)
