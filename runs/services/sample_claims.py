"""Which sample requests a worker takes. They have no order and no state: whoever takes one first answers it.

A worker that ends in order gives back what it has no answer to; that it took them is no attempt.

The answer is stored by `services.commits.commit_sample`.
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

_TAKE_SAMPLES = """
UPDATE runs_operation SET attempts = attempts + (worker_id IS DISTINCT FROM me.id)::int, worker_id = me.id,
  started_at = COALESCE(started_at, clock_timestamp())
FROM (SELECT set_config('synchronous_commit', 'off', true)) AS relaxed, (SELECT %s::bigint AS id) AS me
WHERE runs_operation.id IN (
  SELECT op.id FROM runs_operation op JOIN runs_samplingsession s ON s.id = op.sampling_session_id
  LEFT JOIN runs_worker w ON w.id = op.worker_id
  WHERE op.state = 'queued' AND op.sampling_session_id IS NOT NULL AND s.base_model = ANY(%s)
    AND (op.worker_id IS NULL OR w.stopped_at IS NOT NULL
         OR (op.worker_id = %s AND NOT op.id = ANY(%s::bigint[])))
    AND EXISTS (SELECT 1 FROM runs_worker me WHERE me.id = %s AND me.drain_asked_at IS NULL)
    AND NOT EXISTS (SELECT 1 FROM runs_checkpoint c WHERE c.id = s.checkpoint_id AND c.is_ephemeral
                    AND c.size_bytes = 0 AND NOT c.directory = ANY(%s::text[]))
  ORDER BY op.id LIMIT %s FOR UPDATE OF op SKIP LOCKED)
RETURNING runs_operation.id, sampling_session_id, payload, payload_file, attempts, lone_attempts
"""


@dataclass(frozen=True, kw_only=True)
class TakenSample:
    """A sample request this worker answers, with where its weights are.

    `checkpoint_directory` is empty for the bare base model; `is_lost` when the weights were deleted.
    """

    pk: int
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
    unwritten: Collection[str] = (),
) -> list[TakenSample]:
    """Return sample requests that no live worker has, oldest first; `held` are those this one knows it has.

    Weights whose file is not written yet can be sampled from where they are in memory: `unwritten` names those here.
    """
    if not Operation.objects.filter(state=Operation.State.QUEUED, sampling_session__isnull=False).exists():
        return []
    values: list[Any] = [
        worker.pk,
        list(base_models),
        worker.pk,
        list(held),
        worker.pk,
        list(unwritten),
        limit,
    ]
    with connection.cursor() as cursor:
        cursor.execute(_TAKE_SAMPLES, values)
        rows = cursor.fetchall()
    found = SamplingSession.objects.filter(pk__in={row[1] for row in rows}).select_related("checkpoint")
    sessions = {session.pk: session for session in found}
    taken = []
    for pk, session_pk, payload, payload_file, attempts, lone_attempts in sorted(rows, key=itemgetter(0)):
        session = sessions[session_pk]
        checkpoint = session.checkpoint
        taken.append(
            TakenSample(
                pk=pk,
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


def release_samples(worker: Worker) -> None:
    """Give back what a worker has taken and will not answer: it ends in order, not of them."""
    unanswered = Operation.objects.filter(
        worker=worker, sampling_session__isnull=False, state=Operation.State.QUEUED
    )
    unanswered.update(worker=None, attempts=Greatest(F("attempts") - 1, 0), lone_attempts=0)
