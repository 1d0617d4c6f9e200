"""Make results true: the one statement that all of the product's safety rests on.

Every commit of a run moves `applied_seq` from what the worker believed to what it computed, under
the fence it claimed with, in the same transaction as results, metrics and checkpoints. No row
changed means that somebody else owns the run: the caller throws its in-memory state away.
Commits so form one chain; nothing is applied twice, skipped or reordered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from django.db import connection, transaction

from runs import events, ids
from runs.models import (
    Checkpoint,
    Metric,
    Operation,
    RunEvent,
    SamplingSession,
    Session,
    Snapshot,
    TrainingRun,
)

NUM_SNAPSHOTS_KEPT: Final = 2

_ADVANCE = """
UPDATE runs_trainingrun SET applied_seq = %s, step = %s, num_tokens = num_tokens + %s,
  loss = COALESCE(%s, loss), tokens_per_s = COALESCE(%s, tokens_per_s),
  state = %s, error = %s, last_applied_at = clock_timestamp()
WHERE id = %s AND fence = %s AND applied_seq = %s
"""
_FINISH = """
UPDATE runs_operation SET state = %s, result = %s, result_is_proto = %s, error = %s, error_category = %s,
  fence = %s, finished_at = clock_timestamp()
WHERE id = %s AND state = 'queued'
"""
_SKIP = """
INSERT INTO runs_operation (owner_id, run_id, seq, kind, state, payload_file, payload_digest, num_tokens,
  result_is_proto, error, error_category, fence, attempts)
VALUES (%s, %s, %s, 'skipped', 'failed', '', '', 0, false, 'the client never sent this request', 'user', %s, 0)
ON CONFLICT DO NOTHING
"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an operation answers: a result in wire form, or an error with its category."""

    body: bytes | None = None
    is_proto: bool = False
    error: str = ""
    category: str = ""


@dataclass(frozen=True, kw_only=True)
class NewCheckpoint:
    """Weights already written to storage, to be registered with the commit."""

    kind: str
    name: str
    directory: str
    size_bytes: int
    is_ephemeral: bool = False
    overwrite: bool = False
    ttl_seconds: int | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    sampling_session_seq: int | None = None


@dataclass(frozen=True, kw_only=True)
class AppliedOperation:
    """One operation the worker has applied. `pk` is None for a seq that never came."""

    pk: int | None
    seq: int
    step: int
    result: Result
    metrics: Mapping[str, float] = field(default_factory=dict)
    checkpoint: NewCheckpoint | None = None


@dataclass(frozen=True, kw_only=True)
class RunCommit:
    """Everything one cycle did to one run."""

    run_pk: int
    owner_id: int
    public_id: str
    base_model: str
    session_public_id: str
    fence: int
    from_seq: int
    operations: Sequence[AppliedOperation]
    step: int
    num_tokens: int
    loss: float | None = None
    tokens_per_s: float | None = None
    state: str = TrainingRun.State.OPEN
    error: str = ""

    @property
    def to_seq(self) -> int:
        """The run's applied_seq after this commit."""
        return self.operations[-1].seq


def commit_all(runs: Sequence[RunCommit]) -> list[bool]:
    """Apply one cycle's effects on its runs in one transaction; false for a run another worker owns."""
    with transaction.atomic():
        return [_commit(run) for run in runs]


def register_snapshot(run_pk: int, *, fence: int, seq: int, directory: str, size_bytes: int) -> list[str]:
    """Register a snapshot already in storage; returns the folders of those it makes superfluous."""
    Snapshot.objects.create(run_id=run_pk, seq=seq, fence=fence, directory=directory, size_bytes=size_bytes)
    old = list(Snapshot.objects.filter(run_id=run_pk).order_by("-seq", "-fence")[NUM_SNAPSHOTS_KEPT:])
    Snapshot.objects.filter(pk__in=[row.pk for row in old]).delete()
    return [row.directory for row in old]


def commit_sample(operation_pk: int, result: Result) -> None:
    """Store a sample's answer; the first one written stands."""
    with transaction.atomic():
        with connection.cursor() as cursor:
            state = Operation.State.FAILED if result.body is None else Operation.State.DONE
            values = [state, result.body, result.is_proto, result.error, result.category, 0, operation_pk]
            cursor.execute(_FINISH, values)
            was_first = cursor.rowcount == 1
        if was_first:
            events.notify_done([operation_pk])
            _sample_changed(operation_pk)


def add_event(run_pk: int, *, seq: int, step: int, kind: str, detail: Mapping[str, Any]) -> None:
    """Enter something people should see on the run's page."""
    RunEvent.objects.create(run_id=run_pk, seq=seq, step=step, kind=kind, detail=dict(detail))


def _commit(run: RunCommit) -> bool:
    if not _advance(run):
        return _was_committed(run)
    with connection.cursor() as cursor:
        cursor.executemany(_SKIP, [_skip_values(run, op) for op in run.operations if op.pk is None])
        cursor.executemany(_FINISH, [_finish_values(run, op) for op in run.operations if op.pk is not None])
    _insert_metrics(run)
    for op in run.operations:
        if op.checkpoint is not None:
            _register(run, op, op.checkpoint)
    events.notify_done(op.pk for op in run.operations if op.pk is not None)
    events.run_changed(run.run_pk, run.owner_id, run.public_id)
    return True


def _advance(run: RunCommit) -> bool:
    loss = run.loss if run.loss is None or math.isfinite(run.loss) else None
    values = [run.to_seq, run.step, run.num_tokens, loss, run.tokens_per_s, run.state, run.error]
    with connection.cursor() as cursor:
        cursor.execute(_ADVANCE, [*values, run.run_pk, run.fence, run.from_seq])
        return bool(cursor.rowcount == 1)


def _was_committed(run: RunCommit) -> bool:
    """Tell a lost run from a commit whose confirmation was lost on the way."""
    return TrainingRun.objects.filter(pk=run.run_pk, fence=run.fence, applied_seq=run.to_seq).exists()


def _skip_values(run: RunCommit, op: AppliedOperation) -> list[Any]:
    return [run.owner_id, run.run_pk, op.seq, run.fence]


def _finish_values(run: RunCommit, op: AppliedOperation) -> list[Any]:
    result = op.result
    state = Operation.State.FAILED if result.body is None else Operation.State.DONE
    return [state, result.body, result.is_proto, result.error, result.category, run.fence, op.pk]


def _insert_metrics(run: RunCommit) -> None:
    Metric.objects.bulk_create(
        Metric(run_id=run.run_pk, seq=op.seq, name=name, step=op.step, value=value)
        for op in run.operations
        for name, value in op.metrics.items()
    )


def _register(run: RunCommit, op: AppliedOperation, new: NewCheckpoint) -> None:
    if new.overwrite:
        Checkpoint.objects.filter(run_id=run.run_pk, kind=new.kind, name=new.name).delete()
    checkpoint = Checkpoint.objects.create(
        owner_id=run.owner_id,
        run_id=run.run_pk,
        kind=new.kind,
        name=new.name,
        is_ephemeral=new.is_ephemeral,
        directory=new.directory,
        size_bytes=new.size_bytes,
        seq=op.seq,
        step=op.step,
        user_metadata=dict(new.user_metadata),
        expires_at=_expiry(new.ttl_seconds),
    )
    if new.sampling_session_seq is not None:
        _open_sampling_session(run, checkpoint, new.sampling_session_seq)


def _open_sampling_session(run: RunCommit, checkpoint: Checkpoint, seq_id: int) -> None:
    session = Session.objects.get(public_id=run.session_public_id)
    SamplingSession.objects.get_or_create(
        session=session,
        seq_id=seq_id,
        defaults={
            "public_id": ids.sampling_session_id(session.public_id, seq_id),
            "owner_id": run.owner_id,
            "base_model": run.base_model,
            "checkpoint": checkpoint,
            "run_id": run.run_pk,
            "model_path": str(ids.CheckpointPath(run.public_id, checkpoint.kind, checkpoint.name)),
        },
    )


def _expiry(ttl_seconds: int | None) -> datetime | None:
    if ttl_seconds is None:
        return None
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp() + make_interval(secs => %s)", [ttl_seconds])
        (expires_at,) = cursor.fetchone()
    return expires_at  # type: ignore[no-any-return]


def _sample_changed(operation_pk: int) -> None:
    session = SamplingSession.objects.select_related("run").filter(operations__pk=operation_pk).first()
    if session is not None and session.run is not None:
        events.run_changed(session.run.pk, session.owner_id, session.run.public_id)
