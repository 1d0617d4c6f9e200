"""How good the weights of a checkpoint were: losses at its step, and whether it is its run's best."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from django.db import connection

from runs.models import Checkpoint, Recipe
from runs.services.recipe_rows import AUTOMATIC, FINAL

# The training loss is the last one before the save; a validation comes before or after it, at the same step. A recipe
# measures by its own count of steps, which the names of its checkpoints have: a step whose gradient was not finite is
# in it, and not in the checkpoint's. `final` is of the recipe's last step once that has ended with it.
_READ: Final = """
WITH placed AS MATERIALIZED (
  SELECT c.id, c.run_id, c.seq, COALESCE(
    CASE WHEN r.run_id IS NULL OR c.kind <> %(kind)s THEN NULL
      WHEN c.name ~ %(automatic)s THEN substring(c.name FROM '[0-9]+$')::bigint
      WHEN c.name = %(final)s AND r.state = ANY(%(ended)s) THEN r.next_step END,
    c.step) AS step,
    r.best_step, r.run_id IS NOT NULL AND c.kind = %(kind)s AND (c.name = %(final)s OR c.name ~ %(automatic)s) AS is_own
  FROM runs_checkpoint c LEFT JOIN runs_recipe r ON r.run_id = c.run_id
  WHERE c.id = ANY(%(ids)s)
), validated AS MATERIALIZED (
  SELECT DISTINCT ON (m.run_id, m.step) m.run_id, m.step, m.value FROM runs_metric m
  WHERE m.run_id = ANY(%(runs)s) AND m.name = 'validation_loss' AND m.step IN (SELECT step FROM placed)
  ORDER BY m.run_id, m.step, m.seq DESC
)
SELECT p.id,
  (SELECT m.value FROM runs_metric m WHERE m.run_id = p.run_id AND m.name = 'loss' AND m.seq <= p.seq
   ORDER BY m.seq DESC LIMIT 1),
  v.value, COALESCE(p.is_own AND p.best_step = p.step, false)
FROM placed p LEFT JOIN validated v ON v.run_id = p.run_id AND v.step = p.step
"""


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """Losses at the checkpoint's step as far as they are known, and whether they are its recipe's best weights."""

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
                "kind": Checkpoint.Kind.TRAINING,
                "automatic": f"^{AUTOMATIC}[0-9]{{1,9}}$",
                "final": FINAL,
                "ended": [Recipe.State.FINISHED, Recipe.State.STOPPED],
            },
        )
        rows = cursor.fetchall()
    return {
        pk: CheckpointFacts(loss=_finite(loss), validation_loss=_finite(validation), is_best=is_best)
        for pk, loss, validation, is_best in rows
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
