"""How good the weights of a checkpoint were: losses at its step, and whether it is its run's best."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from django.db import connection

from runs.models import Checkpoint

# The training loss is the last one before the save; a validation comes before or after it, at the same step.
_READ: Final = """
WITH validated AS MATERIALIZED (
  SELECT DISTINCT ON (m.run_id, m.step) m.run_id, m.step, m.value FROM runs_metric m
  WHERE m.run_id = ANY(%(runs)s) AND m.name = 'validation_loss' AND m.step = ANY(%(steps)s)
  ORDER BY m.run_id, m.step, m.seq DESC
)
SELECT c.id,
  (SELECT m.value FROM runs_metric m WHERE m.run_id = c.run_id AND m.name = 'loss' AND m.seq <= c.seq
   ORDER BY m.seq DESC LIMIT 1),
  v.value, COALESCE(r.best_step = c.step AND c.kind = 'weights', false)
FROM runs_checkpoint c LEFT JOIN validated v ON v.run_id = c.run_id AND v.step = c.step
LEFT JOIN runs_recipe r ON r.run_id = c.run_id
WHERE c.id = ANY(%(ids)s)
"""


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """Losses at the checkpoint's step as far as they are known."""

    loss: float | None
    validation_loss: float | None
    is_best: bool


UNKNOWN: Final = CheckpointFacts(loss=None, validation_loss=None, is_best=False)


def facts_of(checkpoints: Collection[Checkpoint]) -> Mapping[int, CheckpointFacts]:
    """Return the facts of each checkpoint, by its number, in one query."""
    with connection.cursor() as cursor:
        cursor.execute(
            _READ,
            {
                "ids": [checkpoint.pk for checkpoint in checkpoints],
                "runs": list({checkpoint.run_id for checkpoint in checkpoints}),
                "steps": list({checkpoint.step for checkpoint in checkpoints}),
            },
        )
        rows = cursor.fetchall()
    return {
        pk: CheckpointFacts(loss=_finite(loss), validation_loss=_finite(validation), is_best=is_best)
        for pk, loss, validation, is_best in rows
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
