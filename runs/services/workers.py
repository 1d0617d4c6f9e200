"""GPU workers: register, keep the lease, find the dead. All times are the database's.

Two signs of life: a session advisory lock on the worker's number, which PostgreSQL frees within
milliseconds when the process dies, and a lease for hosts that vanish without closing anything.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final

from django.db import connection, transaction
from django.db.models import (
    BooleanField,
    Count,
    Exists,
    ExpressionWrapper,
    F,
    OuterRef,
    Q,
    QuerySet,
    Subquery,
    Value,
)
from django.db.models.functions import Coalesce, Greatest, Now

from runs import events
from runs.exceptions import RequestInvalid
from runs.models import Operation, TrainingRun, Worker
from runs.services.advisory_locks import LockClass

LEASE_S: Final = 15
HEARTBEAT_S: Final = 3
# A page looks every 5 s: one that stops counting a worker this long before its lease ends tells within 15 s.
DOUBT_S: Final = 6
LOCK_CLASS: Final = LockClass.WORKER
# A worker takes its lock just after its row is there; until then only its lease says that it lives.
LOCK_GRACE_S: Final = 2
# When the database was away all locks are free and leases run out: each worker needs a heartbeat to show itself again.
RETURN_GRACE_S: Final = HEARTBEAT_S + LOCK_GRACE_S + 1
# Workers of earlier versions entered one fingerprint without its base model's name: they count for every one.
UNNAMED: Final = "torch"


class WorkerState(StrEnum):
    """What people see; derived from the row and what it holds, never stored."""

    ALIVE = "alive"
    DRAINING = "draining"
    DRAINED = "drained"
    LOST = "lost"
    ENDED = "ended"


def register(*, device: str, dtype: str) -> Worker:
    """Enter this process as a worker with a fresh lease."""
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO runs_worker (host, pid, device, dtype, memory_bytes, lease_until)"
            " VALUES (%s, %s, %s, %s, 0, clock_timestamp() + make_interval(secs => %s)) RETURNING id",
            [socket.gethostname(), os.getpid(), device, dtype, LEASE_S],
        )
        (pk,) = cursor.fetchone()
    return Worker.objects.get(pk=pk)


def describe(
    worker: Worker,
    *,
    device: str,
    dtype: str,
    memory_bytes: int = 0,
    fingerprints: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Enter what the worker computes on and, for each base model it has loaded, with; 0 bytes are not known."""
    Worker.objects.filter(pk=worker.pk).update(
        device=device[:40], dtype=dtype, memory_bytes=memory_bytes, fingerprint=dict(fingerprints or {})
    )


def renew(worker: Worker, *, busy_share: float, samplers: Mapping[str, str] | None = None) -> bool:
    """Push the lease out; false when the worker was declared dead meanwhile.

    Args:
        samplers: who draws the samples, in words, for each base model with a server for that.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE runs_worker SET lease_until = clock_timestamp() + make_interval(secs => %s), busy_share = %s,"
            " samplers = %s::jsonb WHERE id = %s AND stopped_at IS NULL",
            [LEASE_S, busy_share, json.dumps(dict(samplers or {})), worker.pk],
        )
        return bool(cursor.rowcount == 1)


def stop(worker: Worker) -> None:
    """Enter the worker's end and set its runs free."""
    TrainingRun.objects.filter(worker=worker).update(worker=None, free_since=Now())
    Worker.objects.filter(pk=worker.pk).update(stopped_at=Now())


def bury_dead(*, sparing: Worker | None = None) -> list[Worker]:
    """Enter the end of every worker whose lease ran out or whose lock is free; returns them.

    A worker spares itself: its own lock is free for a moment while it connects anew. Where a server has just
    started, or ended all sessions, nobody can tell who is dead.
    """
    if not _server_has_settled():
        return []
    return [
        worker for worker in Worker.objects.filter(stopped_at=None) if worker != sparing and _bury(worker)
    ]


def drain(worker: Worker) -> None:
    """Have a worker take nothing new, finish what it computes and let its runs go; it stays alive.

    Raises:
        RequestInvalid: it has ended.
    """
    _steer(worker, Worker.objects.filter(drain_asked_at=None), drain_asked_at=Now())


def resume(worker: Worker) -> None:
    """Let a drained worker take runs again.

    Raises:
        RequestInvalid: it has ended.
    """
    _steer(worker, Worker.objects.exclude(drain_asked_at=None), drain_asked_at=None)


def live() -> QuerySet[Worker]:
    """Return the workers that are alive as far as people are told."""
    return Worker.objects.filter(is_alive())


def serving() -> QuerySet[Worker]:
    """Return the live workers that take runs: all but those that are drained."""
    return live().filter(drain_asked_at=None)


def having(base_model: str) -> QuerySet[Worker]:
    """Return the live workers that have a base model loaded and take what is asked of it."""
    return live().filter(fingerprint__has_any_keys=[base_model, UNNAMED])


def models_of(worker: Worker) -> list[str]:
    """Return the base models that a worker has loaded."""
    return [name for name, fingerprint in worker.fingerprint.items() if isinstance(fingerprint, dict)]


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Whether any worker lives, and what none takes on: base models that drained ones alone have, and runs that wait."""

    has_worker: bool
    stranded: list[str]
    num_waiting: int


def outlook() -> Outlook:
    """Return what people should know before they send anything."""
    alive = list(live())
    taken = {name for worker in alive if worker.drain_asked_at is None for name in models_of(worker)}
    stranded = sorted({name for worker in alive for name in models_of(worker)} - taken)
    waiting = Operation.objects.filter(run=OuterRef("pk"), state=Operation.State.QUEUED)
    runs = TrainingRun.objects.filter(Exists(waiting), base_model__in=stranded, worker=None)
    return Outlook(has_worker=bool(alive), stranded=stranded, num_waiting=runs.count() if stranded else 0)


def is_alive() -> Q:
    """Return the condition on workers that `live` puts: the end is not entered, and signs of life are not late."""
    return Q(stopped_at=None, lease_until__gt=Now() + timedelta(seconds=min(DOUBT_S, 0.4 * LEASE_S)))


def recent(*, limit: int) -> list[Worker]:
    """Return the live workers and then those that ended last, with what each holds.

    The rows are those of `with_state`.
    """
    return list(with_state().order_by("-is_alive", "-started_at")[:limit])  # type: ignore[misc]


def with_state() -> QuerySet[Worker]:
    """Annotate `is_alive`, `num_runs` (runs it holds) and `num_samples` (samples it draws): what `state_of` needs."""
    drawn = Operation.objects.filter(
        worker=OuterRef("pk"), state=Operation.State.QUEUED, sampling_session__isnull=False
    )
    counted = drawn.order_by().values("worker").annotate(number=Count("pk")).values("number")
    return Worker.objects.annotate(
        is_alive=ExpressionWrapper(is_alive(), output_field=BooleanField()),
        num_runs=Count("training_runs"),
        num_samples=Coalesce(Subquery(counted), 0),
    )


def state_of(worker: Worker) -> WorkerState:
    """Return the state a person sees; the row comes from `with_state`."""
    if not worker.is_alive:  # type: ignore[attr-defined]
        return WorkerState.ENDED if worker.stopped_at else WorkerState.LOST
    if worker.drain_asked_at is None:
        return WorkerState.ALIVE
    is_holding = worker.num_runs or worker.num_samples  # type: ignore[attr-defined]
    return WorkerState.DRAINING if is_holding else WorkerState.DRAINED


def _steer(worker: Worker, among: QuerySet[Worker], **values: object) -> None:
    """Change what a worker is asked for and ring it; what it is asked for already changes nothing."""
    with transaction.atomic():
        if among.filter(pk=worker.pk, stopped_at=None).update(**values):
            events.ring_workers()
        elif not Worker.objects.filter(pk=worker.pk, stopped_at=None).exists():
            raise RequestInvalid(
                f"worker {worker.pk} has ended; only one that is alive is drained or resumed", place="id"
            )


def _server_has_settled() -> bool:
    """Say whether any session of ours is so old that every live worker has one again.

    A server that was restarted, or that ended all sessions after a crash of one, has none.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT min(backend_start) <= clock_timestamp() - make_interval(secs => %s)"
            " FROM pg_stat_activity WHERE datname = current_database()",
            [RETURN_GRACE_S],
        )
        (has_settled,) = cursor.fetchone()
    return bool(has_settled)


def _bury(worker: Worker) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s, %s)", [LOCK_CLASS, worker.pk])
        (lock_was_free,) = cursor.fetchone()
        if lock_was_free:
            cursor.execute("SELECT pg_advisory_unlock(%s, %s)", [LOCK_CLASS, worker.pk])
    is_dead = Q(lease_until__lte=Now())
    if lock_was_free:
        is_dead |= Q(started_at__lte=Now() - timedelta(seconds=LOCK_GRACE_S))
    dead = Worker.objects.filter(is_dead, pk=worker.pk, stopped_at=None)
    if dead.update(stopped_at=Now()) == 0:
        return False
    _set_free(worker)
    return True


def _set_free(worker: Worker) -> None:
    """Set a dead worker's runs free, but for one that it froze over a commit of: that one is free once its lock is."""
    with transaction.atomic():
        unlocked = TrainingRun.objects.select_for_update(skip_locked=True).filter(worker=worker)
        last_sign_at = worker.lease_until - timedelta(seconds=LEASE_S)
        TrainingRun.objects.filter(pk__in=unlocked.values("pk")).update(
            worker=None,
            free_since=Now(),
            lost_at=Coalesce("lost_at", Greatest(Value(last_sign_at), F("last_applied_at"))),
        )
