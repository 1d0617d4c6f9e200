"""Make results true: the one statement that all of the product's safety rests on.

Every commit of a cycle moves `applied_seq` from what the worker believed to what it computed, under
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
    Operation,
    RunEvent,
    SamplingSession,
    Session,
    Snapshot,
    TrainingRun,
)
from runs.services import checkpoints, deletions, webhooks

NUM_SNAPSHOTS_KEPT: Final = 2
EVENT_STEPS: Final = 100

# One statement, so one round trip: a worker's commits decide how soon a waiting client gets its answer.
_COMMIT = """
WITH run AS (
  UPDATE runs_trainingrun r SET applied_seq = new.to_seq, step = new.step,
    num_tokens = r.num_tokens + new.num_tokens, loss = COALESCE(new.loss, r.loss),
    tokens_per_s = COALESCE(new.tokens_per_s, r.tokens_per_s),
    state = CASE WHEN r.state = 'open' THEN new.state ELSE r.state END,
    error = CASE WHEN r.state = 'open' THEN new.error ELSE r.error END, last_applied_at = clock_timestamp()
  FROM unnest(%(run)s::bigint[], %(fence)s::bigint[], %(from_seq)s::bigint[], %(to_seq)s::bigint[],
    %(step)s::bigint[], %(num_tokens)s::bigint[], %(loss)s::float8[], %(tokens_per_s)s::float8[],
    %(run_state)s::text[], %(run_error)s::text[], %(done)s::text[])
    AS new(id, fence, from_seq, to_seq, step, num_tokens, loss, tokens_per_s, state, error, done)
  WHERE r.id = new.id AND r.fence = new.fence AND r.applied_seq = new.from_seq
  RETURNING r.id, r.owner_id, r.fence, new.done
), finished AS (
  UPDATE runs_operation o SET state = new.state, result = new.result, result_is_proto = new.is_proto,
    error = new.error, error_category = new.category, fence = run.fence, finished_at = clock_timestamp()
  FROM run JOIN unnest(%(op_run)s::bigint[], %(op)s::bigint[], %(op_state)s::text[], %(result)s::bytea[],
    %(is_proto)s::bool[], %(op_error)s::text[], %(category)s::text[])
    AS new(run_id, id, state, result, is_proto, error, category) ON new.run_id = run.id
  WHERE o.id = new.id AND o.state = 'queued'
), skipped AS (
  INSERT INTO runs_operation (owner_id, run_id, seq, kind, state, payload_file, payload_digest, num_tokens,
    result_is_proto, error, error_category, fence, attempts, lone_attempts)
  SELECT run.owner_id, run.id, new.seq, 'skipped', 'failed', '', '', 0, false,
    'the client never sent this request', 'user', run.fence, 0, 0
  FROM run JOIN unnest(%(skip_run)s::bigint[], %(skip_seq)s::bigint[]) AS new(run_id, seq) ON new.run_id = run.id
  ON CONFLICT (run_id, seq) DO UPDATE SET state = 'failed', error = 'arrived after its seq_id was given up',
    error_category = 'user', fence = excluded.fence, finished_at = clock_timestamp()
    WHERE runs_operation.state = 'queued'
), measured AS (
  INSERT INTO runs_metric (run_id, seq, name, step, value)
  SELECT run.id, new.seq, new.name, new.step, new.value
  FROM run JOIN unnest(%(metric_run)s::bigint[], %(metric_seq)s::bigint[], %(metric_name)s::text[],
    %(metric_step)s::bigint[], %(metric_value)s::float8[]) AS new(run_id, seq, name, step, value)
    ON new.run_id = run.id
)
SELECT run.id, pg_notify(%(channel)s, run.done) FROM run
"""
_FINISH_SAMPLE = """
UPDATE runs_operation SET state = %s, result = %s, result_is_proto = %s, error = %s, error_category = %s,
  finished_at = clock_timestamp()
WHERE id = %s AND state = 'queued'
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
    """One operation the worker has applied. `pk` is None for a seq that never came.

    `event` is the kind of an event that people should see.
    """

    pk: int | None
    seq: int
    step: int
    result: Result
    metrics: Mapping[str, float] = field(default_factory=dict)
    checkpoint: NewCheckpoint | None = None
    event: str = ""


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
    if not runs:
        return []
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute(_COMMIT, _columns(runs))
            advanced = {row[0] for row in cursor.fetchall()}
        for run in runs:
            if run.run_pk in advanced:
                _register_checkpoints(run)
                _enter_events(run)
                _tell_addresses(run)
                events.run_changed(run.run_pk, run.owner_id, run.public_id)
    return [run.run_pk in advanced or _was_committed(run) for run in runs]


def register_snapshot(run_pk: int, *, fence: int, seq: int, directory: str, size_bytes: int) -> list[str]:
    """Register a snapshot already in storage and delete what is of no use (any more); returns those folders.

    Under a fence that is no longer the run's, and beside another one after the same operation, that is the
    snapshot's own. Repeating it changes nothing.
    """
    with transaction.atomic():
        if not TrainingRun.objects.select_for_update().filter(pk=run_pk, fence=fence).exists():
            deletions.add(directory)
            return [directory]
        values = {"directory": directory, "size_bytes": size_bytes}
        kept, _ = Snapshot.objects.get_or_create(run_id=run_pk, seq=seq, fence=fence, defaults=values)
        old = list(Snapshot.objects.filter(run_id=run_pk).order_by("-seq", "-fence")[NUM_SNAPSHOTS_KEPT:])
        Snapshot.objects.filter(pk__in=[row.pk for row in old]).delete()
        loser = [] if kept.directory == directory else [directory]
        useless = [*loser, *(row.directory for row in old)]
        deletions.add(*useless)
    return useless


def commit_samples(answers: Mapping[int, Result]) -> None:
    """Store the answers of samples by their operations' keys; of each the first one written stands."""
    with transaction.atomic():
        new = [pk for pk, result in sorted(answers.items()) if _is_first_answer(pk, result)]
        if new:
            events.notify_done(new)
        for operation_pk in new:
            _sample_changed(operation_pk)


def _is_first_answer(operation_pk: int, result: Result) -> bool:
    values = [_state_of(result), result.body, result.is_proto, result.error, result.category]
    with connection.cursor() as cursor:
        cursor.execute(_FINISH_SAMPLE, [*values, operation_pk])
        return bool(cursor.rowcount == 1)


def fail_run(run_pk: int, *, fence: int, error: str) -> None:
    """Enter that a run cannot go on; what still waits is answered by whoever holds it."""
    with transaction.atomic():
        open_run = TrainingRun.objects.filter(pk=run_pk, fence=fence, state=TrainingRun.State.OPEN)
        if open_run.update(state=TrainingRun.State.FAILED, error=error):
            run = TrainingRun.objects.get(pk=run_pk)
            webhooks.client_ended(run_pk)
            events.run_changed(run.pk, run.owner_id, run.public_id)


def add_event(run_pk: int, *, seq: int, step: int, kind: str, detail: Mapping[str, Any]) -> None:
    """Enter something people should see on the run's page."""
    RunEvent.objects.create(run_id=run_pk, seq=seq, step=step, kind=kind, detail=dict(detail))


def _columns(runs: Sequence[RunCommit]) -> dict[str, Any]:
    """Return the commit as columns, the form in which PostgreSQL takes many rows in one statement."""
    ops = [(run, op) for run in runs for op in run.operations if op.pk is not None]
    skips = [(run, op) for run in runs for op in run.operations if op.pk is None]
    metrics = [(run, op, *item) for run in runs for op in run.operations for item in op.metrics.items()]
    return {
        "channel": events.DONE_CHANNEL,
        "run": [run.run_pk for run in runs],
        "fence": [run.fence for run in runs],
        "from_seq": [run.from_seq for run in runs],
        "to_seq": [run.to_seq for run in runs],
        "step": [run.step for run in runs],
        "num_tokens": [run.num_tokens for run in runs],
        "loss": [_finite(run.loss) for run in runs],
        "tokens_per_s": [run.tokens_per_s for run in runs],
        "run_state": [run.state for run in runs],
        "run_error": [run.error for run in runs],
        "done": [events.done_payload(op.pk for op in run.operations if op.pk is not None) for run in runs],
        "op_run": [run.run_pk for run, _ in ops],
        "op": [op.pk for _, op in ops],
        "op_state": [_state_of(op.result) for _, op in ops],
        "result": [op.result.body for _, op in ops],
        "is_proto": [op.result.is_proto for _, op in ops],
        "op_error": [op.result.error for _, op in ops],
        "category": [op.result.category for _, op in ops],
        "skip_run": [run.run_pk for run, _ in skips],
        "skip_seq": [op.seq for _, op in skips],
        "metric_run": [run.run_pk for run, _, _, _ in metrics],
        "metric_seq": [op.seq for _, op, _, _ in metrics],
        "metric_name": [name for _, _, name, _ in metrics],
        "metric_step": [op.step for _, op, _, _ in metrics],
        "metric_value": [value for _, _, _, value in metrics],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _state_of(result: Result) -> str:
    return Operation.State.FAILED if result.body is None else Operation.State.DONE


def _was_committed(run: RunCommit) -> bool:
    """Tell a lost run from a commit whose confirmation was lost on the way."""
    return TrainingRun.objects.filter(pk=run.run_pk, fence=run.fence, applied_seq=run.to_seq).exists()


def _tell_addresses(run: RunCommit) -> None:
    values = ((name, op.step, value) for op in run.operations for name, value in op.metrics.items())
    webhooks.note_values(run.run_pk, run.owner_id, values)
    if run.state != TrainingRun.State.OPEN:
        webhooks.client_ended(run.run_pk)


def _enter_events(run: RunCommit) -> None:
    """Enter what people should see; of one kind once in so many steps, as a run may go wrong at each of them."""
    for op in run.operations:
        if not op.event:
            continue
        known = RunEvent.objects.filter(run_id=run.run_pk, kind=op.event, step__gt=op.step - EVENT_STEPS)
        if not known.exists():
            detail = {"error": op.result.error} if op.result.error else {}
            RunEvent.objects.create(run_id=run.run_pk, seq=op.seq, step=op.step, kind=op.event, detail=detail)


def _register_checkpoints(run: RunCommit) -> None:
    for op in run.operations:
        if op.checkpoint is not None:
            register_checkpoint(run, op, op.checkpoint)
        elif op.result.error:
            _withdraw_owed(run, op)


def _withdraw_owed(run: RunCommit, op: AppliedOperation) -> None:
    """Give up weights that a former owner has promised with an early answer and that cannot be made any more."""
    owed = Checkpoint.objects.filter(run_id=run.run_pk, seq=op.seq, is_ephemeral=True, size_bytes=0)
    checkpoints.delete(*owed)


def register_checkpoint(run: RunCommit, op: AppliedOperation, new: NewCheckpoint) -> None:
    """Enter a checkpoint of an operation, and open the sampling session that it was made for, if any."""
    if new.overwrite:
        namesakes = Checkpoint.objects.filter(run_id=run.run_pk, kind=new.kind, name=new.name)
        checkpoints.delete(*namesakes)
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
