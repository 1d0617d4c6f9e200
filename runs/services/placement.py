"""Which worker takes which free run, and which lets one go, when several workers serve the same base models.

Each worker decides for itself from rows that all of them see, for each base model among those that have loaded
it: a fair share is what it may claim at once, and a worker with clearly more active runs than another gives
some away. No run is left over: one that nobody
took for `PATIENCE_S` goes to whoever serves its base model. A worker that is drained counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from django.db import connection
from django.db.models import Exists

from runs.models import Worker
from runs.services.workers import UNNAMED, serving

# A run counts as active for so long after its last operation, so that clients that think do not look like ended ones.
ACTIVE_S: Final = 60
PATIENCE_S: Final = 3
# Fewer runs more than another worker are no reason to move one: that would only go to and fro.
HYSTERESIS: Final = 2

_COUNT = """
SELECT w.id, (SELECT count(*) FROM runs_trainingrun r WHERE r.worker_id = w.id AND r.base_model = %s
  AND (r.last_applied_at > clock_timestamp() - make_interval(secs => %s)
       OR EXISTS (SELECT 1 FROM runs_operation op WHERE op.run_id = r.id AND op.state = 'queued')))
FROM runs_worker w WHERE w.stopped_at IS NULL AND w.lease_until > clock_timestamp() AND w.fingerprint ?| %s
  AND w.drain_asked_at IS NULL
UNION ALL
SELECT NULL, (SELECT count(DISTINCT op.run_id) FROM runs_operation op JOIN runs_trainingrun r ON r.id = op.run_id
  LEFT JOIN runs_worker w ON w.id = r.worker_id
  WHERE op.state = 'queued' AND (r.worker_id IS NULL OR w.stopped_at IS NOT NULL) AND r.base_model = %s)
"""
_WANTED = """
SELECT DISTINCT r.base_model FROM runs_trainingrun r LEFT JOIN runs_worker w ON w.id = r.worker_id
WHERE (r.worker_id IS NULL OR w.stopped_at IS NOT NULL) AND r.base_model = ANY(%s)
  AND EXISTS (SELECT 1 FROM runs_operation op WHERE op.run_id = r.id AND op.state = 'queued')
"""


@dataclass(frozen=True, kw_only=True)
class Loads:
    """Active runs on a base model: of a worker, of the others that serve it, and those with work that nobody has."""

    mine: int
    others: tuple[int, ...]
    num_free: int

    @property
    def room(self) -> int:
        """How many free runs the worker may claim at once."""
        total = self.mine + sum(self.others) + self.num_free
        share = -(-total // (1 + len(self.others)))
        return max(share - self.mine, 0)

    @property
    def surplus(self) -> int:
        """How many runs the worker should give away; none while others are still to be claimed."""
        if self.num_free or not self.others:
            return 0
        difference = self.mine - min(self.others)
        return difference // 2 if difference >= HYSTERESIS else 0


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Whether others serve the same base models, and whether the worker itself is to let its runs go."""

    has_company: bool
    is_drained: bool


def look(worker: Worker, base_models: Sequence[str]) -> Surroundings:
    """Return what a worker that serves these base models has to know before it takes runs."""
    others = serving().exclude(pk=worker.pk).filter(fingerprint__has_any_keys=[*base_models, UNNAMED])
    me = Worker.objects.filter(pk=worker.pk).annotate(has_company=Exists(others))
    found = me.values_list("has_company", "drain_asked_at").first()
    has_company, drain_asked_at = found or (False, None)
    return Surroundings(has_company=has_company, is_drained=drain_asked_at is not None)


def wanted(base_models: Sequence[str]) -> list[str]:
    """Return those of the base models that have a free run with work: a quick look, before anything is counted."""
    with connection.cursor() as cursor:
        cursor.execute(_WANTED, [list(base_models)])
        return [name for (name,) in cursor.fetchall()]


def loads(worker: Worker, base_model: str) -> Loads:
    """Return how the runs of a base model are spread now."""
    with connection.cursor() as cursor:
        cursor.execute(_COUNT, [base_model, ACTIVE_S, [base_model, UNNAMED], base_model])
        counts: dict[int | None, int] = dict(cursor.fetchall())
    num_free = counts.pop(None)
    mine = counts.pop(worker.pk, 0)
    return Loads(mine=mine, others=tuple(counts.values()), num_free=num_free)
