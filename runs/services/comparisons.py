"""What a page that compares runs reads of all of them at once: as many queries for twenty as for two."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from django.db import connection
from django.db.models import F, OuterRef, QuerySet, Subquery
from django.db.models.functions import Coalesce

from runs.models import Metric, TrainingRun, User
from runs.services import access, run_rows

MAX_RUNS: Final = 20
"""The most runs that are compared at once."""
# From one name to the next in the index: a long run has few names and very many values.
_NAMES: Final = """
WITH RECURSIVE found(run_id, name) AS (
  SELECT wanted.run_id,
    (SELECT m.name FROM runs_metric m WHERE m.run_id = wanted.run_id ORDER BY m.name LIMIT 1)
  FROM unnest(%s::bigint[]) AS wanted(run_id)
  UNION ALL
  SELECT f.run_id,
    (SELECT m.name FROM runs_metric m WHERE m.run_id = f.run_id AND m.name > f.name ORDER BY m.name LIMIT 1)
  FROM found f WHERE f.name IS NOT NULL
)
SELECT run_id, name FROM found WHERE name IS NOT NULL ORDER BY run_id, name
"""
# What a run left behind when it went back to an earlier step does not count, as in `sparklines`.
_VALIDATIONS: Final = """
WITH found AS (
  SELECT run_id, step, seq, value, CASE WHEN step < lag(step) OVER run THEN step END AS returned
  FROM runs_metric WHERE run_id = ANY(%s) AND name = 'validation_loss'
  WINDOW run AS (PARTITION BY run_id ORDER BY seq)
), kept AS (
  SELECT run_id, step, seq, value, min(returned) OVER (
    PARTITION BY run_id ORDER BY seq ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING) AS returns_to
  FROM found
)
SELECT run_id, (array_agg(value ORDER BY seq DESC))[1],
  (array_agg(value ORDER BY value, seq) FILTER (WHERE value < 'Infinity' AND value > '-Infinity'))[1],
  (array_agg(step ORDER BY value, seq) FILTER (WHERE value < 'Infinity' AND value > '-Infinity'))[1]
FROM kept WHERE returns_to IS NULL OR returns_to > step GROUP BY run_id
"""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A run's validation losses: the last one, and the lowest finite one with its step."""

    last: float
    lowest: float | None
    lowest_step: int | None


def chosen(user: User, run_ids: Collection[str]) -> list[TrainingRun]:
    """Return those of the runs that are the user's, in the order of their ids, each with `last_seq`.

    `last_seq` is the cursor after a run's newest value, None without any.
    """
    newest = Metric.objects.filter(run=OuterRef("pk")).order_by("-seq").values("seq")[:1]
    runs = run_rows.with_facts(user).filter(public_id__in=run_ids).annotate(last_seq=Subquery(newest))
    places = {run_id: place for place, run_id in enumerate(run_ids)}
    return sorted(runs, key=lambda run: places[run.public_id])


def latest(user: User, *, limit: int) -> QuerySet[TrainingRun]:
    """Return the user's runs that last did something, to choose from."""
    active_at = Coalesce(F("last_applied_at"), F("created_at"))
    return access.runs_of(user).annotate(active_at=active_at).order_by("-active_at", "-pk")[:limit]


def names_of(runs: Collection[TrainingRun]) -> dict[int, list[str]]:
    """Return the names of the metrics of each run, by its number."""
    found: dict[int, list[str]] = {run.pk: [] for run in runs}
    for pk, name in _read(_NAMES, runs):
        found[pk].append(name)
    return found


def validations_of(runs: Collection[TrainingRun]) -> dict[int, Validation]:
    """Return the validation losses of each run that has any, by its number."""
    rows = _read(_VALIDATIONS, runs)
    return {pk: Validation(last=last, lowest=lowest, lowest_step=step) for pk, last, lowest, step in rows}


def _read(query: str, runs: Collection[TrainingRun]) -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute(query, [[run.pk for run in runs]])
        rows: list[Any] = cursor.fetchall()
    return rows
