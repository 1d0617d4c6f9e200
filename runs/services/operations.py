"""Enter operations into the log and read their answers. The worker's side is `services.commits`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Max
from django.db.models.functions import Now
from django.utils import timezone

from runs import events
from runs.exceptions import (
    DiskFull,
    MintError,
    NotFound,
    RateLimited,
    RequestInvalid,
    SequenceConflict,
    SessionFinished,
)
from runs.models import Operation, SamplingSession, TrainingRun
from runs.services import blobs, holdups

GAP_PATIENCE_S: Final = 120
MAX_QUEUED_PER_RUN: Final = 10_000
MAX_QUEUED_SAMPLES: Final = 20_000
# What a client sent before it closed its session may arrive later than that, after an outage.
LATE_S: Final = 60

_INSERT = """
INSERT INTO runs_operation
  (owner_id, run_id, sampling_session_id, seq, kind, state, payload, payload_file, payload_digest, num_tokens,
   result_is_proto, error, error_category, loads_from, sampled_run_pk, fence, attempts, lone_attempts)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, false, %s, %s, %s, %s, 0, 0, 0)
ON CONFLICT DO NOTHING RETURNING id
"""
# The row and the doorbell in one round trip; the bell rings when it commits.
_SUBMIT = f"WITH new AS ({_INSERT}) SELECT id, pg_notify(%s, '') FROM new"  # noqa: S608 - two constants


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One operation on its way into the log.

    `digest_of` is what makes a retry the same request; it differs from the payload only where a
    client is known to change a field when it sends a request again. `loads_from` is the folder of weights
    that it reads. `sampled_run_pk` is the run that is at work while the sample is drawn, if any.
    """

    kind: str
    seq: int
    payload: bytes
    num_tokens: int = 0
    digest_of: bytes | None = None
    loads_from: str = ""
    sampled_run_pk: int | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over the kind and what identifies the request."""
        content = self.payload if self.digest_of is None else self.digest_of
        return hashlib.sha256(self.kind.encode() + b"\0" + content).hexdigest()


def submit(run: TrainingRun, submission: Submission) -> int:
    """Make the operation durable and return its number; a retry returns the first one's.

    Raises:
        SequenceConflict: this seq_id holds another request.
        RateLimited: too many operations of the run are waiting.
        RequestInvalid: the run has ended.
        SessionFinished: its client closed the session a while ago.
        DiskFull: there is no room for a large payload.
    """
    if _is_far_ahead(run, submission.seq):
        raise RateLimited(f"{MAX_QUEUED_PER_RUN} operations of this run are waiting already")
    if run.state != TrainingRun.State.OPEN and not _is_known(run, submission.seq):
        reason = f" ({run.error})" if run.error else ""
        raise RequestInvalid(
            f"this run is {run.state}{reason}; it takes no more operations", place="model_id"
        )
    if _is_too_late(run, submission) and not _is_known(run, submission.seq):
        raise SessionFinished
    try:
        pk = _insert(run.owner_id, run, None, submission)
    except DiskFull:
        holdups.enter(run.pk, holdups.NO_ROOM_FOR_REQUEST)
        raise
    if run.held_up == holdups.NO_ROOM_FOR_REQUEST:
        holdups.clear(run.pk, holdups.NO_ROOM_FOR_REQUEST)
    return pk


def unload(run: TrainingRun) -> int:
    """Let a run go after all that was submitted, and return the operation's number; the first one's if that was done.

    Raises:
        NotFound: the run was deleted meanwhile.
        RequestInvalid: the run has ended.
        RateLimited: too many operations of the run are waiting.
    """
    with transaction.atomic():
        # Locked, or two callers would enter one each.
        rows = TrainingRun.objects.select_for_update(no_key=True, of=("self",)).select_related("session")
        held = rows.filter(pk=run.pk).first()
        if held is None:
            raise NotFound("the run was deleted meanwhile")
        latest = latest_of(held, limit=1)
        if latest and latest[0].kind == Operation.Kind.UNLOAD_MODEL:
            return latest[0].pk
        return submit(held, Submission(kind=Operation.Kind.UNLOAD_MODEL, seq=next_seq(held), payload=b"{}"))


def submit_sample(
    sampling_session: SamplingSession, submission: Submission, *, is_of_run: bool = True
) -> int:
    """Make a sample request durable and return its number; a retry returns the first one's.

    Args:
        is_of_run: the run whose weights are sampled from counts as at work meanwhile.

    Raises:
        SequenceConflict: this seq_id holds another request.
        RateLimited: too many samples of the user are waiting.
    """
    waiting = Operation.objects.filter(
        owner_id=sampling_session.owner_id, sampling_session__isnull=False, state=Operation.State.QUEUED
    )
    if waiting[MAX_QUEUED_SAMPLES - 1 : MAX_QUEUED_SAMPLES].exists():
        raise RateLimited(f"{MAX_QUEUED_SAMPLES} samples are waiting already")
    if is_of_run:
        submission = replace(submission, sampled_run_pk=sampling_session.run_id)
    return _insert(sampling_session.owner_id, None, sampling_session, submission)


def cancel_sample(operation_pk: int) -> bool:
    """End a sample that has no answer yet; its worker notices within a second. False when it was too late."""
    waiting = Operation.objects.filter(
        pk=operation_pk, sampling_session__isnull=False, state=Operation.State.QUEUED
    )
    with transaction.atomic():
        is_cancelled = waiting.update(
            state=Operation.State.FAILED, error="stopped", error_category="user", finished_at=Now()
        )
        if is_cancelled:
            events.notify_done([operation_pk])
    return bool(is_cancelled)


def reject(run: TrainingRun, *, seq: int, kind: str, error: MintError) -> None:
    """Take up the seq_id of a refused request: the client does not use the number again.

    A number far ahead is left alone: a worker would have to pass all that it skips.
    """
    if _is_far_ahead(run, seq):
        return
    digest = hashlib.sha256(f"rejected {seq}".encode()).hexdigest()
    values = [
        run.owner_id,
        run.pk,
        None,
        seq,
        kind,
        Operation.State.FAILED,
        None,
        "",
        digest,
        0,
        str(error),
        "user",
        "",
        None,
    ]
    with connection.cursor() as cursor:
        cursor.execute(_SUBMIT, [*values, events.WORK_CHANNEL])
    events.ring_drain()


def payload_of(payload: bytes | memoryview | None, payload_file: str) -> bytes:
    """Return an operation's payload from wherever it was stored."""
    return blobs.get(payload_file) if payload_file else bytes(payload or b"")


def latest_of(run: TrainingRun, *, limit: int) -> list[Operation]:
    """Return the run's latest operations, newest first, without what was sent and answered."""
    return list(Operation.objects.filter(run=run).defer("payload", "result").order_by("-seq")[:limit])


def next_seq(run: TrainingRun) -> int:
    """Return the seq after everything the run's client has sent."""
    last = Operation.objects.filter(run=run).aggregate(last=Max("seq"))["last"]
    return 0 if last is None else int(last) + 1


def finished_among(operation_ids: list[int]) -> list[int]:
    """Return those of the operations that have their answer."""
    rows = Operation.objects.filter(pk__in=operation_ids).exclude(state=Operation.State.QUEUED)
    return list(rows.values_list("pk", flat=True))


def _is_far_ahead(run: TrainingRun, seq: int) -> bool:
    return seq > run.applied_seq + MAX_QUEUED_PER_RUN


def _is_too_late(run: TrainingRun, submission: Submission) -> bool:
    """Say whether the client closed its session before it can have sent this; letting a run go is never too late."""
    finished_at = run.session.finished_at
    if finished_at is None or submission.kind == Operation.Kind.UNLOAD_MODEL:
        return False
    return timezone.now() - finished_at > timedelta(seconds=LATE_S)


def holds(run: TrainingRun, submission: Submission) -> bool:
    """Say whether this very request is in the run's log already."""
    return Operation.objects.filter(run=run, seq=submission.seq, payload_digest=submission.digest).exists()


def _is_known(run: TrainingRun, seq: int) -> bool:
    return Operation.objects.filter(run=run, seq=seq).exists()


def _insert(
    owner_id: int, run: TrainingRun | None, session: SamplingSession | None, submission: Submission
) -> int:
    inline, file = _store(submission)
    values: list[Any] = [owner_id, run and run.pk, session and session.pk, submission.seq, submission.kind]
    values += [Operation.State.QUEUED, inline, file, submission.digest, submission.num_tokens, "", ""]
    values += [submission.loads_from, submission.sampled_run_pk]
    with connection.cursor() as cursor:
        cursor.execute(_SUBMIT, [*values, events.WORK_CHANNEL])
        row = cursor.fetchone()
    if row is None:
        return _existing(run, session, submission)
    events.ring_drain()
    return int(row[0])


def _store(submission: Submission) -> tuple[bytes | None, str]:
    if len(submission.payload) <= settings.INLINE_PAYLOAD_BYTES:
        return submission.payload, ""
    return None, blobs.put(hashlib.sha256(submission.payload).hexdigest(), submission.payload)


def _existing(run: TrainingRun | None, session: SamplingSession | None, submission: Submission) -> int:
    first = Operation.objects.only("pk", "kind", "payload_digest", "error").get(
        run=run, sampling_session=session, seq=submission.seq
    )
    if first.payload_digest == submission.digest:
        return first.pk
    if not first.payload_digest:  # entered by a worker, not for a request
        raise SequenceConflict(
            f"was given up after {GAP_PATIENCE_S} s, when later requests were waiting for it",
            place=f"seq_id {first.seq}",
        )
    raise SequenceConflict(f"already holds another request ({first.kind})", place=f"seq_id {submission.seq}")
