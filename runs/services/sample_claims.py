"""Which sample requests a worker takes. They have no order and no state: whoever takes one first answers it.

Owners take turns: many samples of one do not stand before the few of another.

A worker that ends in order gives back what it has no answer to; that it took them is no attempt.

The answer is stored by `services.commits.commit_samples`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from django.db import connection
from django.db.models import F
from django.db.models.functions import Greatest

from runs.models import Operation, SamplingSession, Worker
from runs.services import operations

# Many samples may wait: the owners are found by leaps through an index, and of each only the first rows are looked at,
# some more than are taken, since other workers take at the same time. What a row refers to is asked in subqueries, as
# joins have the planner sort all that wait.
_TAKE_SAMPLES = """
WITH RECURSIVE owners AS (
  SELECT 0::bigint AS id
  UNION ALL
  SELECT (SELECT owner_id FROM runs_operation WHERE state = 'queued' AND sampling_session_id IS NOT NULL
          AND owner_id > owners.id ORDER BY owner_id, id LIMIT 1) FROM owners WHERE owners.id IS NOT NULL
), mine AS (
  SELECT owner_id, count(*) AS num_held FROM unnest(%(held_owners)s::bigint[]) AS owner_id GROUP BY owner_id
), turns AS (
  SELECT next.id, next.place + COALESCE(mine.num_held, 0) AS place
  FROM owners LEFT JOIN mine ON mine.owner_id = owners.id CROSS JOIN LATERAL (
    SELECT op.id, row_number() OVER (ORDER BY op.id) AS place FROM runs_operation op
    WHERE op.owner_id = owners.id AND op.state = 'queued' AND op.sampling_session_id IS NOT NULL
      AND NOT op.id = ANY(%(held)s::bigint[]) AND (op.worker_id IS NULL OR op.worker_id = %(worker)s
           OR (SELECT w.stopped_at IS NOT NULL FROM runs_worker w WHERE w.id = op.worker_id))
      AND (SELECT s.base_model = ANY(%(base_models)s) AND NOT EXISTS (
             SELECT 1 FROM runs_checkpoint c WHERE c.id = s.checkpoint_id AND c.is_ephemeral
             AND c.size_bytes = 0 AND NOT c.directory = ANY(%(unwritten)s::text[]))
           FROM runs_samplingsession s WHERE s.id = op.sampling_session_id)
    ORDER BY op.id LIMIT 1 + 4 * %(limit)s / (SELECT count(*) - 1 FROM owners)) AS next
  ORDER BY place, next.id LIMIT 4 * %(limit)s
), chosen AS MATERIALIZED (
  SELECT op.id, turns.place FROM turns JOIN runs_operation op ON op.id = turns.id
  WHERE op.state = 'queued' AND (op.worker_id IS NULL OR op.worker_id = %(worker)s
        OR (SELECT w.stopped_at IS NOT NULL FROM runs_worker w WHERE w.id = op.worker_id))
    AND EXISTS (SELECT 1 FROM runs_worker me WHERE me.id = %(worker)s AND me.drain_asked_at IS NULL)
  ORDER BY turns.place, op.id LIMIT %(limit)s FOR UPDATE OF op SKIP LOCKED
)
UPDATE runs_operation SET attempts = attempts + (worker_id IS DISTINCT FROM %(worker)s)::int,
  worker_id = %(worker)s, started_at = COALESCE(started_at, clock_timestamp())
FROM (SELECT set_config('synchronous_commit', 'off', true)) AS relaxed, chosen
WHERE runs_operation.id = chosen.id
RETURNING chosen.place, runs_operation.id, owner_id, sampling_session_id, payload, payload_file, attempts, lone_attempts
"""


@dataclass(frozen=True, kw_only=True)
class TakenSample:
    """A sample request this worker answers, with where its weights are.

    `checkpoint_directory` is empty for the bare base model; `is_lost` when the weights were deleted.
    """

    pk: int
    owner_pk: int
    session_pk: int
    inline: bytes | None
    payload_file: str
    base_model: str
    checkpoint_directory: str
    is_lost: bool
    attempts: int
    lone_attempts: int

    @property
    def payload(self) -> bytes:
        """What the client asked for; read from storage when it is large."""
        return operations.payload_of(self.inline, self.payload_file)


def take_samples(
    worker: Worker,
    base_models: Sequence[str],
    *,
    limit: int,
    held: Collection[int] = (),
    held_owners: Collection[int] = (),
    unwritten: Collection[str] = (),
) -> list[TakenSample]:
    """Return sample requests that no live worker has, in turns between owners, the oldest of each first.

    `held` are those that this worker has, or does not want just now; `held_owners` are the owners of those that it has,
    one for each: who has fewer comes first, so that turns go round also where one request is taken at a time.

    Weights whose file is not written yet can be sampled from where they are in memory: `unwritten` names those here.
    """
    if not Operation.objects.filter(state=Operation.State.QUEUED, sampling_session__isnull=False).exists():
        return []
    values: dict[str, Any] = {
        "worker": worker.pk,
        "base_models": list(base_models),
        "held": list(held),
        "held_owners": list(held_owners),
        "unwritten": list(unwritten),
        "limit": limit,
    }
    with connection.cursor() as cursor:
        cursor.execute(_TAKE_SAMPLES, values)
        rows = cursor.fetchall()
    found = SamplingSession.objects.filter(pk__in={row[3] for row in rows}).select_related("checkpoint")
    sessions = {session.pk: session for session in found}
    taken = []
    for _, pk, owner_pk, session_pk, payload, payload_file, attempts, lone_attempts in sorted(
        rows, key=itemgetter(0, 1)
    ):
        session = sessions[session_pk]
        checkpoint = session.checkpoint
        taken.append(
            TakenSample(
                pk=pk,
                owner_pk=owner_pk,
                session_pk=session_pk,
                inline=None if payload is None else bytes(payload),
                payload_file=payload_file,
                base_model=session.base_model,
                checkpoint_directory=checkpoint.directory if checkpoint else "",
                is_lost=bool(session.model_path) and checkpoint is None,
                attempts=attempts,
                lone_attempts=lone_attempts,
            )
        )
    return taken


def release_samples(worker: Worker, *, only: Collection[int] | None = None) -> None:
    """Give back what a worker has taken and will not answer, all or some: it ends in order, or lets go, not of them."""
    unanswered = Operation.objects.filter(
        worker=worker, sampling_session__isnull=False, state=Operation.State.QUEUED
    )
    if only is not None:
        unanswered = unanswered.filter(pk__in=only)
    unanswered.update(worker=None, attempts=Greatest(F("attempts") - 1, 0), lone_attempts=0)
