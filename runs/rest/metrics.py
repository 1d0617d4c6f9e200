"""The numbers of a run: names, buckets for charts, raw values after a cursor, everything as a file."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Literal

from django.http import HttpRequest
from django.http.response import HttpResponseBase
from ninja import Query, Router
from pydantic import BaseModel, Field, StringConstraints

from runs.rest.boundary import caller
from runs.rest.paging import Limit, pack, unpack
from runs.rest.rendering import Number
from runs.services import access, metric_exports, metrics
from runs.streams import streamed

router = Router(tags=["metrics"])

MetricName = Annotated[str, StringConstraints(min_length=1, max_length=64)]
StepNumber = Annotated[int, Field(ge=0, le=2**62)]
MAX_NAMES = 32


class MetricNames(BaseModel):
    """The metrics that a run has values of."""

    names: list[str]


class Bucket(BaseModel):
    """The values of a range of steps; no extreme is hidden. Not finite values are counted apart."""

    step: int
    last_step: int
    low: Number
    high: Number
    mean: Number
    count: int
    num_nonfinite: int


class Series(BaseModel):
    """One metric over a range of steps."""

    name: str
    buckets: list[Bucket]


class SeriesList(BaseModel):
    """The metrics that were asked for."""

    series: list[Series]


class Value(BaseModel):
    """One value as it was recorded; one that is not finite is null, and `nonfinite` says which."""

    seq: int
    step: int
    recorded_at: datetime
    name: str
    value: Number
    nonfinite: Literal["NaN", "Infinity", "-Infinity"] | None


class Values(BaseModel):
    """Values in the order they were recorded."""

    items: list[Value]
    cursor: str = Field(description="Ask with it for what comes after, now or later.")
    has_more: bool = Field(description="Whether there is more already.")


@router.get("/{run_id}/metrics", response=MetricNames, summary="Names of the metrics")
def list_metrics(request: HttpRequest, run_id: str) -> MetricNames:
    """Return what is recorded of the run."""
    return MetricNames(names=metrics.names(access.get_run(caller(request), run_id)))


@router.get("/{run_id}/metrics/series", response=SeriesList, summary="Series in buckets")
def get_series(
    request: HttpRequest,
    run_id: str,
    name: Annotated[
        list[MetricName], Query(description="May be given several times; all when left out.")
    ] = [],  # noqa: B006 - Ninja copies it
    buckets: Annotated[int, Field(ge=1, le=2000)] = 500,
    from_step: StepNumber = 0,
    to_step: StepNumber | None = None,
) -> SeriesList:
    """Return metrics as lowest, highest and mean value of each bucket of steps; 32 metrics at most."""
    run = access.get_run(caller(request), run_id)
    chosen = (name or metrics.names(run))[:MAX_NAMES]
    found = {
        one: metrics.series(run, one, num_buckets=buckets, from_step=from_step, to_step=to_step)
        for one in chosen
    }
    return SeriesList(
        series=[
            Series(name=one, buckets=[Bucket(**asdict(bucket)) for bucket in listed])
            for one, listed in found.items()
        ]
    )


@router.get("/{run_id}/metrics/values", response=Values, summary="Raw values")
def list_values(
    request: HttpRequest,
    run_id: str,
    cursor: Annotated[str | None, Query(max_length=1000, description="Nothing for the beginning.")] = None,
    limit: Limit = 200,
) -> Values:
    """Return values after a cursor; those of one operation come together, so a page may be a little longer."""
    run = access.get_run(caller(request), run_id)
    scope = f"values {run.pk}"
    after = -1 if cursor is None else int(unpack(cursor, scope=scope)[0])
    points = metrics.points_after(run, after, limit=limit)
    end = points[-1].seq if points else after
    return Values(
        items=[_value(point) for point in points],
        cursor=pack([end], scope=scope),
        has_more=end < metrics.last_seq(run),
    )


@router.get(
    "/{run_id}/metrics/export",
    summary="Everything as a file",
    openapi_extra={
        "responses": {
            200: {
                "description": "The file",
                "content": {
                    content_type.partition(";")[0]: {"schema": {}}
                    for content_type, _ in metric_exports.FORMATS.values()
                },
            }
        }
    },
)
def export_metrics(
    request: HttpRequest,
    run_id: str,
    format: Literal["csv", "json", "parquet"] = "csv",
    name: MetricName | None = None,
) -> HttpResponseBase:
    """Return every value of the run, or of one metric, as CSV, JSON or Parquet."""
    run = access.get_run(caller(request), run_id)
    content_type, write = metric_exports.FORMATS[format]
    session, _, number = run.public_id.partition(":train:")
    return streamed(
        write(metric_exports.pages(run, name=name or "")),
        content_type=content_type,
        filename=f"metrics-{session[:8]}-{number}.{format}",
    )


def _value(point: metrics.Point) -> Value:
    is_finite = math.isfinite(point.value)
    return Value(
        seq=point.seq,
        step=point.step,
        recorded_at=point.recorded_at,
        name=point.name,
        value=point.value,
        nonfinite=None if is_finite else metrics.word(point.value),
    )
