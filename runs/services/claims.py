"""Which runs a worker holds and which operations it takes; the other half is `services.commits`.

A run belongs to the worker its row names. Claiming raises the fence, so that nothing a former
owner still computes can be committed.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from django.db import connection, transaction
from django.db.models import F, Max
from django.db.models.functions import Coalesce, Greatest, Now

from runs import events
from runs.models import Checkpoint, Operation, RunEvent, Snapshot, TrainingRun, Worker
from runs.services import operations, workers

# Free is a run without a worker, one that names a dead worker (it may have claimed before it noticed its
# burial), and one that names this worker, which knows nothing of it (an answer was lost, or it gave the run up).
# A volatile clock_timestamp() inside EXISTS would have the database look at every run there is.
# Materialized, or a plan might look for further ones for each that it finds.
_FREE = """
WITH free AS MATERIALIZED (
  SELECT run.id, CASE WHEN run.worker_id IS NOT NULL THEN
    GREATEST(run.last_applied_at, w.lease_until - make_interval(secs => %s)) END AS lost_at
  FROM runs_trainingrun run LEFT JOIN runs_worker w ON w.id = run.worker_id
  WHERE (run.worker_id IS NULL OR w.stopped_at IS NOT NULL
         OR (run.worker_id = %s AND NOT run.id = ANY(%s::bigint[])))
    AND run.base_model = ANY(%s) AND (run.rests_until IS NULL OR run.rests_until <= statement_timestamp())
    AND EXISTS (SELECT 1 FROM runs_worker me
                WHERE me.id = %s AND me.stopped_at IS NULL AND me.drain_asked_at IS NULL)
"""
_HAS_WORK = """
    AND EXISTS (SELECT 1 FROM runs_operation op WHERE op.run_id = run.id AND op.state = 'queued'
                AND GREATEST(op.created_at, run.free_since, w.stopped_at)
                  <= statement_timestamp() - make_interval(secs => %s))
"""
_TAKE_FREE = """
  ORDER BY run.id LIMIT %s FOR UPDATE OF run SKIP LOCKED
)
UPDATE runs_trainingrun taken SET fence = taken.fence + 1, worker_id = %s,
  lost_at = COALESCE(taken.lost_at, free.lost_at)
FROM free WHERE taken.id = free.id RETURNING taken.id
"""
_CLAIM = _FREE + _HAS_WORK + _TAKE_FREE
# A run whose save was answered by a worker that died before it wrote the file; see `services.early_answers`.
_IS_OWING = """
    AND EXISTS (SELECT 1 FROM runs_checkpoint c WHERE c.run_id = run.id AND c.is_ephemeral AND c.size_bytes = 0
                AND c.seq > run.applied_seq)
"""
_CLAIM_OWING = _FREE + _IS_OWING + _TAKE_FREE
# The run is back: since its former worker's last sign of life, or since somebody waits for it if that is later.
_END_RECOVERY = """
UPDATE runs_trainingrun run SET lost_at = NULL, num_replayed = 0, num_to_replay = 0
FROM (SELECT id, GREATEST(lost_at, (SELECT min(created_at) FROM runs_operation op
        WHERE op.run_id = lost.id AND op.state = 'queued')) AS since, lost_at
      FROM runs_trainingrun lost WHERE id = %s AND fence = %s FOR UPDATE) was
WHERE run.id = was.id RETURNING CASE WHEN was.lost_at IS NOT NULL THEN
  GREATEST(EXTRACT(EPOCH FROM clock_timestamp() - was.since), 0)::float8 END
"""
# A statement that only counts attempts need not wait for the disk: a count lost in a power cut means one more try.
# Taking one again that this worker has taken before (it was behind a gap) is no further attempt.
# The next operation of a run of which nothing waits in the worker is taken whatever else waits there. Of the others
# those come first that have the fewest tokens of their run before them: what is left out is not all of one run.
_TAKE = """
UPDATE runs_operation SET attempts = attempts + (worker_id IS DISTINCT FROM me.id)::int, worker_id = me.id,
  started_at = COALESCE(started_at, clock_timestamp())
FROM (SELECT set_config('synchronous_commit', 'off', true)) AS relaxed, (SELECT %s::bigint AS id) AS me
WHERE runs_operation.id IN (
  SELECT id FROM (
    SELECT op.id, held.waiting IS NULL AND op.place = 1 AS is_next,
      sum(op.num_tokens) OVER (ORDER BY COALESCE(held.waiting, 0) + op.before, op.place, op.id)
        - op.num_tokens AS tokens_before
    FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[]) AS held(run_id, taken_seq, waiting)
    CROSS JOIN LATERAL (
      SELECT id, num_tokens, row_number() OVER following AS place,
        sum(num_tokens) OVER following - num_tokens AS before
      FROM runs_operation WHERE run_id = held.run_id AND seq > held.taken_seq
      WINDOW following AS (ORDER BY seq ROWS UNBOUNDED PRECEDING) ORDER BY seq LIMIT %s
    ) op) ranked
  WHERE is_next OR tokens_before < %s)
RETURNING runs_operation.id, run_id, seq, kind, state, payload, payload_file, num_tokens, attempts, lone_attempts,
  EXTRACT(EPOCH FROM clock_timestamp() - created_at)::float8,
  EXTRACT(EPOCH FROM created_at - (SELECT before.finished_at FROM runs_operation before
    WHERE before.run_id = runs_operation.run_id AND before.seq = runs_operation.seq - 1))::float8
"""
# What is left of the time between the answer to the operation before and the request, once that is taken out in which
# samples of the run waited or were drawn. The clock may be set back between the two ends of a sample.
_WITHOUT_SAMPLES = """
SELECT op.id, EXTRACT(EPOCH FROM (
  SELECT COALESCE(sum(upper(gap) - lower(gap)), interval '0')
  FROM unnest(tstzmultirange(tstzrange(before.finished_at, op.created_at)) - drawn.spans) AS gap))::float8
FROM runs_operation op JOIN runs_operation before ON before.run_id = op.run_id AND before.seq = op.seq - 1
CROSS JOIN LATERAL (
  SELECT COALESCE(range_agg(tstzrange(LEAST(sample.created_at, sample.finished_at), sample.finished_at)), '{}') AS spans
  FROM runs_operation sample
  WHERE sample.sampled_run_pk = op.run_id AND sample.created_at < op.created_at
    AND (sample.finished_at > before.finished_at OR sample.finished_at IS NULL)) AS drawn
WHERE op.id = ANY(%s) AND before.finished_at < op.created_at
"""
# So short a gap is not worth a look at the samples.
_NOTABLE_S: Final = 0.05
MAX_CLAIMS: Final = 256
# Workers that an operation may end alone before it is given up: done again it would end more.
LONE_ATTEMPTS: Final = 2


@dataclass(frozen=True, kw_only=True)
class HeldRun:
    """A run that this worker owns, as it was when claimed; one that had failed by then says why.

    One that a recipe trains has no client.
    """

    pk: int
    owner_id: int
    public_id: str
    session_public_id: str
    base_model: str
    fence: int
    applied_seq: int
    step: int
    lora_rank: int
    lora_alpha: float
    lora_seed: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool
    failure: str = ""
    has_client: bool = True


@dataclass(frozen=True, kw_only=True)
class TakenOperation:
    """The next operation of a held run. A rejected one only takes up its seq; an answered one is applied once more.

    `client_gap_s` is how long there was nothing to do for the run before this one was asked for: neither an operation
    nor a sample of its weights. It is 0 where the one before had no answer yet.
    """

    pk: int
    run_pk: int
    seq: int
    kind: str
    is_rejected: bool
    inline: bytes | None
    payload_file: str
    num_tokens: int
    attempts: int
    lone_attempts: int
    waited_s: float
    client_gap_s: float = 0.0
    result: bytes | None = None
    is_answered: bool = False

    @property
    def payload(self) -> bytes:
        """What the client asked for; read from storage when it is large."""
        return operations.payload_of(self.inline, self.payload_file)


def claim_runs(
    worker: Worker,
    base_models: Sequence[str],
    *,
    held: Collection[int] = (),
    waited_s: float = 0.0,
    limit: int = MAX_CLAIMS,
) -> list[HeldRun]:
    """Take free runs that have work for this worker's base models; `held` are the runs it knows it has.

    Args:
        waited_s: only runs that were free, with work, for so long.
        limit: how many at most.
    """
    limit = min(limit, MAX_CLAIMS)
    values = [*_values_of_free(worker, base_models, held), waited_s, limit, worker.pk]
    return _claimed(worker, _CLAIM, values)


def _values_of_free(worker: Worker, base_models: Sequence[str], held: Collection[int]) -> list[Any]:
    return [workers.LEASE_S, worker.pk, list(held), list(base_models), worker.pk]


def _claimed(worker: Worker, statement: str, values: list[Any]) -> list[HeldRun]:
    pks = [row[0] for row in _rows(statement, values)]
    if not pks:
        return []
    rows = TrainingRun.objects.filter(pk__in=pks, worker=worker).select_related("session", "recipe")
    return [_held(row) for row in rows]


def claim_owing(worker: Worker, base_models: Sequence[str], *, held: Collection[int] = ()) -> list[HeldRun]:
    """Take free runs with a save that was answered but is not applied yet, so that its file is written."""
    values = [*_values_of_free(worker, base_models, held), MAX_CLAIMS, worker.pk]
    return _claimed(worker, _CLAIM_OWING, values)


def release_run(run_pk: int, worker: Worker, *, fence: int, is_lost: bool = False) -> None:
    """Set a run free for whoever has room, unless it was claimed again meanwhile.

    One whose state in memory is lost or not trusted has to recover. One that is let go in order has had no
    harm from the operations that wait: that this worker took them is no attempt.
    """
    held = TrainingRun.objects.filter(pk=run_pk, worker=worker, fence=fence)
    with transaction.atomic():
        if is_lost:
            held.update(worker=None, free_since=Now(), lost_at=Coalesce("lost_at", Now()))
        elif held.update(worker=None, free_since=Now()):
            waiting = Operation.objects.filter(run_id=run_pk, worker=worker, state=Operation.State.QUEUED)
            waiting.update(worker=None, attempts=Greatest(F("attempts") - 1, 0), lone_attempts=0)
            events.ring_workers()


def missing_among(run_pks: Collection[int]) -> set[int]:
    """Return those of the runs that were deleted."""
    return set(run_pks) - set(TrainingRun.objects.filter(pk__in=run_pks).values_list("pk", flat=True))


def take_operations(
    worker: Worker,
    taken_seqs: Mapping[int, int],
    *,
    limit: int,
    max_tokens: int = sys.maxsize,
    waiting: Mapping[int, int] = MappingProxyType({}),
) -> list[TakenOperation]:
    """Return the operations after each held run's last taken seq, in order of run and seq.

    Attempts are counted before anything is computed: the scheduler tries one that several workers took in
    vain alone.

    Args:
        limit: operations of each run.
        max_tokens: input tokens of all together, beyond which no further one is taken but a run's next.
        waiting: input tokens that wait in the worker already, of each run of which something does.
    """
    if not taken_seqs:
        return []
    held = [list(taken_seqs), list(taken_seqs.values()), [waiting.get(pk) for pk in taken_seqs]]
    rows = _rows(_TAKE, [worker.pk, *held, limit, max_tokens])
    gaps = _gaps({row[0]: row[11] for row in rows})
    taken = [
        TakenOperation(
            pk=row[0],
            run_pk=row[1],
            seq=row[2],
            kind=row[3],
            is_rejected=row[4] == Operation.State.FAILED,
            is_answered=row[4] == Operation.State.DONE,
            inline=None if row[5] is None else bytes(row[5]),
            payload_file=row[6],
            num_tokens=row[7],
            attempts=row[8],
            lone_attempts=row[9],
            waited_s=row[10],
            client_gap_s=gaps[row[0]],
        )
        for row in rows
    ]
    return sorted(taken, key=lambda op: (op.run_pk, op.seq))


def _gaps(since_answer: Mapping[int, float | None]) -> dict[int, float]:
    """Return how long each operation's run had nothing to do before it, from the seconds since the answer before."""
    gaps = {pk: max(seconds or 0.0, 0.0) for pk, seconds in since_answer.items()}
    notable = [pk for pk, seconds in gaps.items() if seconds > _NOTABLE_S]
    return gaps | dict(_rows(_WITHOUT_SAMPLES, [notable])) if notable else gaps


def count_applied(run_pk: int, *, after_seq: int, up_to_seq: int) -> int:
    """Return how many operations `applied_operations` yields."""
    return Operation.objects.filter(run_id=run_pk, seq__gt=after_seq, seq__lte=up_to_seq).count()


def fingerprints_of(
    run_pk: int, base_model: str, *, after_seq: int, up_to_seq: int
) -> list[Mapping[str, str]]:
    """Return what the workers computed with that applied these operations; one that did not tell counts as empty."""
    rows = Operation.objects.filter(run_id=run_pk, seq__gt=after_seq, seq__lte=up_to_seq)
    found = Worker.objects.filter(pk__in=rows.values("worker")).values_list("fingerprint", flat=True)
    of_model = [fingerprints.get(base_model) for fingerprints in found]
    # Earlier versions entered the fingerprint of one base model, without its name.
    return [one if isinstance(one, dict) else {} for one in of_model]


def end_recovery(run: HeldRun, *, step: int, detail: Mapping[str, Any]) -> None:
    """Enter that a run is back: recovered after `took_s` seconds, or restored when its worker had set it free in order.

    A run of which nothing was applied yet has nothing to tell.
    """
    with transaction.atomic():
        rows = _rows(_END_RECOVERY, [run.pk, run.fence])
        events.run_changed(run.pk, run.owner_id, run.public_id)
        if not rows or run.applied_seq < 0:
            return
        took_s = rows[0][0]
        kind = "restored" if took_s is None else "recovered"
        told = dict(detail) if took_s is None else {**detail, "took_s": round(took_s, 2)}
        RunEvent.objects.create(run_id=run.pk, seq=run.applied_seq, step=step, kind=kind, detail=told)


def enter_replay(run: HeldRun, *, num_replayed: int, num_to_replay: int) -> None:
    """Tell people how far a run that was taken over is back."""
    values = {"num_replayed": num_replayed, "num_to_replay": num_to_replay}
    TrainingRun.objects.filter(pk=run.pk, fence=run.fence).update(**values)
    events.run_changed(run.pk, run.owner_id, run.public_id)


def count_lone_attempt(operation_pk: int) -> None:
    """Count, before it begins, that an operation is tried with nothing beside it."""
    Operation.objects.filter(pk=operation_pk).update(lone_attempts=F("lone_attempts") + 1)


def applied_operations(run_pk: int, *, after_seq: int, up_to_seq: int) -> Iterator[TakenOperation]:
    """Yield a run's applied operations with their results for replay, without counting an attempt."""
    rows = Operation.objects.filter(run_id=run_pk, seq__gt=after_seq, seq__lte=up_to_seq).order_by("seq")
    for row in rows.iterator(chunk_size=16):
        yield TakenOperation(
            pk=row.pk,
            run_pk=run_pk,
            seq=row.seq,
            kind=row.kind,
            is_rejected=row.state == Operation.State.FAILED,
            inline=None if row.payload is None else bytes(row.payload),
            payload_file=row.payload_file,
            num_tokens=row.num_tokens,
            attempts=0,
            lone_attempts=0,
            waited_s=0.0,
            result=bytes(row.result) if row.result is not None else None,
        )


def results_since_step(run_pk: int, *, up_to_seq: int) -> list[bytes]:
    """Return the answers to the forward_backwards whose gradient is there after a seq, as far as they are kept.

    Those are the ones after the last optimizer step and the last load, which throws gradients away.
    """
    done = Operation.objects.filter(run_id=run_pk, seq__lte=up_to_seq, state=Operation.State.DONE)
    ends = [Operation.Kind.OPTIM_STEP, Operation.Kind.LOAD_WEIGHTS]
    last_end = done.filter(kind__in=ends).aggregate(seq=Max("seq"))["seq"]
    answers = done.filter(kind=Operation.Kind.FORWARD_BACKWARD, result__isnull=False)
    if last_end is not None:
        answers = answers.filter(seq__gt=last_end)
    return [bytes(result or b"") for result in answers.order_by("seq").values_list("result", flat=True)]


def latest_snapshots(run_pk: int, *, up_to_seq: int) -> list[tuple[int, str]]:
    """Return (seq, storage folder) of the run's snapshots, newest first."""
    rows = Snapshot.objects.filter(run_id=run_pk, seq__lte=up_to_seq).order_by("-seq", "-fence")
    return list(rows.values_list("seq", "directory"))


def has_payloads_after(run_pk: int, seq: int) -> bool:
    """Return whether the payloads of all operations after this one are kept, so that they can be replayed."""
    return TrainingRun.objects.filter(pk=run_pk, payloads_gone_seq__lte=seq).exists()


def checkpoint_exists(run_pk: int, *, kind: str, name: str) -> bool:
    """Return whether the run has a checkpoint of this kind and name."""
    return Checkpoint.objects.filter(run_id=run_pk, kind=kind, name=name).exists()


def _rows(statement: str, values: list[Any]) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(statement, values)
        rows: list[tuple[Any, ...]] = cursor.fetchall()
    return rows


def _held(run: TrainingRun) -> HeldRun:
    return HeldRun(
        pk=run.pk,
        owner_id=run.owner_id,
        public_id=run.public_id,
        session_public_id=run.session.public_id,
        base_model=run.base_model,
        fence=run.fence,
        applied_seq=run.applied_seq,
        step=run.step,
        lora_rank=run.lora_rank,
        lora_alpha=run.lora_alpha,
        lora_seed=run.lora_seed,
        train_attn=run.train_attn,
        train_mlp=run.train_mlp,
        train_unembed=run.train_unembed,
        failure=(run.error or "it failed") if run.state == TrainingRun.State.FAILED else "",
        has_client=getattr(run, "recipe", None) is None,
    )
