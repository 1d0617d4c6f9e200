"""Workers: two signs of life, both by the database alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest
from django.db import connection
from django.db.models import F
from django.db.models.functions import Now

from runs.exceptions import RequestInvalid
from runs.models import TrainingRun, User, Worker
from runs.services import claims, sample_claims, workers
from tests.services import rows
from tests.services.hand_worker import HandWorker
from tests.up.instances import wait_for

DETECTED_WITHIN_S = 5.0
HOUR = timedelta(hours=1)
Connection = psycopg.Connection[tuple[object, ...]]


@pytest.fixture
def lock(worker: HandWorker) -> Iterator[Connection]:
    """Hold the worker's lock on a connection of its own, as the worker process does."""
    Worker.objects.filter(pk=worker.row.pk).update(started_at=F("started_at") - HOUR)
    with psycopg.connect(**connection.get_connection_params(), autocommit=True) as held:
        held.execute("SELECT pg_advisory_lock(%s, %s)", [workers.LOCK_CLASS, worker.row.pk])
        yield held


def let_lease_end(worker: HandWorker) -> None:
    Worker.objects.filter(pk=worker.row.pk).update(lease_until=Now() - timedelta(seconds=1))


def test_a_new_worker_is_live_for_its_lease(worker: HandWorker) -> None:
    assert list(workers.live()) == [worker.row]
    rest = Worker.objects.filter(
        lease_until__gt=Now() + timedelta(seconds=workers.LEASE_S - 5),
        lease_until__lte=Now() + timedelta(seconds=workers.LEASE_S + 5),
    )
    assert rest.count() == 1


def test_the_living_are_not_buried(worker: HandWorker, run: TrainingRun, lock: Connection) -> None:
    worker.hold(run)
    assert workers.bury_dead() == []
    run.refresh_from_db()
    assert run.worker_id == worker.row.pk


def test_a_closed_lock_connection_means_death_at_once(
    worker: HandWorker, run: TrainingRun, lock: Connection
) -> None:
    worker.hold(run)
    lock.close()
    deadline = time.monotonic() + DETECTED_WITHIN_S
    while (buried := workers.bury_dead()) == []:  # the server needs a moment to notice the closed socket
        assert time.monotonic() < deadline
    assert buried == [worker.row]
    run.refresh_from_db()
    assert run.worker_id is None
    assert not workers.live().exists()
    assert HandWorker().hold(run).fence == 2


def test_a_lease_that_ran_out_means_death_though_the_lock_is_held(
    worker: HandWorker, run: TrainingRun, lock: Connection
) -> None:
    """A stopped process or a frozen machine keeps its connection."""
    worker.hold(run)
    let_lease_end(worker)
    assert workers.bury_dead() == [worker.row]
    run.refresh_from_db()
    assert run.worker_id is None


@pytest.mark.django_db(transaction=True)
def test_a_worker_frozen_in_a_commit_keeps_that_run_only(
    worker: HandWorker, run: TrainingRun, alice: User
) -> None:
    """Its transaction stays open, and its lock on the run with it, until the server ends the session."""
    other = rows.make_run(alice)
    worker.hold(run)
    worker.hold(other)
    let_lease_end(worker)
    with psycopg.connect(**connection.get_connection_params()) as frozen:
        frozen.execute("UPDATE runs_trainingrun SET step = 1 WHERE id = %s", [run.pk])
        with connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = '3s'")
        assert workers.bury_dead() == [worker.row]
        assert [held.pk for held in claims.claim_runs(HandWorker().row, [other.base_model])] == [other.pk]
        frozen.rollback()
    assert [held.pk for held in claims.claim_runs(HandWorker().row, [run.base_model])] == [run.pk]
    connection.close()


def test_a_worker_that_just_started_may_not_have_its_lock_yet(worker: HandWorker) -> None:
    assert workers.bury_dead() == []
    Worker.objects.filter(pk=worker.row.pk).update(started_at=F("started_at") - HOUR)
    assert workers.bury_dead() == [worker.row]


def test_nobody_is_found_dead_just_after_the_server_came_up(
    worker: HandWorker, run: TrainingRun, lock: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All locks are free and leases over: those that live need a heartbeat to show it."""
    worker.hold(run)
    lock.close()
    let_lease_end(worker)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT EXTRACT(EPOCH FROM clock_timestamp() - min(backend_start)) FROM pg_stat_activity"
        )
        (oldest_s,) = cursor.fetchone()
    monkeypatch.setattr(workers, "RETURN_GRACE_S", float(oldest_s) + 60)
    assert workers.bury_dead() == []
    monkeypatch.setattr(workers, "RETURN_GRACE_S", 0)
    assert workers.bury_dead() == [worker.row]


def test_the_dead_are_buried_once(worker: HandWorker, lock: Connection) -> None:
    let_lease_end(worker)
    assert workers.bury_dead() == [worker.row]
    assert workers.bury_dead() == []


def num_locks() -> int:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = %s AND database ="
            " (SELECT oid FROM pg_database WHERE datname = current_database())",
            [workers.LOCK_CLASS],
        )
        row = cursor.fetchone()
        assert row is not None
        return int(row[0])


def test_the_check_leaves_the_lock_free(worker: HandWorker, lock: Connection) -> None:
    lock.close()
    wait_for(lambda: num_locks() == 0, timeout_s=30)
    for _ in range(3):
        workers.bury_dead()
        assert num_locks() == 0


def test_a_renewal_pushes_the_lease_out(worker: HandWorker) -> None:
    let_lease_end(worker)
    assert workers.renew(worker.row, busy_share=0.5)
    worker.row.refresh_from_db()
    assert worker.row.busy_share == 0.5
    assert list(workers.live()) == [worker.row]


def test_a_buried_worker_is_told_at_its_next_renewal(worker: HandWorker, lock: Connection) -> None:
    let_lease_end(worker)
    workers.bury_dead()
    assert not workers.renew(worker.row, busy_share=0.0)
    assert not workers.live().exists()


def test_a_worker_that_stops_sets_its_runs_free(worker: HandWorker, run: TrainingRun) -> None:
    worker.hold(run)
    workers.stop(worker.row)
    run.refresh_from_db()
    assert run.worker_id is None
    assert not workers.live().exists()


def state_of(worker: HandWorker) -> str:
    return workers.state_of(workers.with_state().get(pk=worker.row.pk))


def test_a_worker_is_drained_once_it_holds_nothing(alice: User, run: TrainingRun, worker: HandWorker) -> None:
    worker.hold(run)
    pk = rows.sample(rows.make_sampling_session(alice), 0)
    sample_claims.take_samples(worker.row, [run.base_model], limit=9)
    assert state_of(worker) == "alive"
    workers.drain(worker.row)
    assert state_of(worker) == "draining"
    worker.release(run)
    assert state_of(worker) == "draining"
    rows.answer_sample(pk)
    assert state_of(worker) == "drained"
    assert workers.renew(worker.row, busy_share=0.0)
    assert list(workers.live()) == [worker.row]
    assert not workers.serving().exists()
    assert state_of(HandWorker()) == "alive"  # one that starts anew is not drained
    workers.resume(worker.row)
    assert state_of(worker) == "alive"
    assert worker.row in workers.serving()


def test_a_worker_that_has_ended_is_neither_drained_nor_resumed(worker: HandWorker) -> None:
    workers.drain(worker.row)
    workers.drain(worker.row)
    let_lease_end(worker)
    assert state_of(worker) == "lost"
    workers.stop(worker.row)
    assert state_of(worker) == "ended"
    for steer in (workers.drain, workers.resume):
        with pytest.raises(RequestInvalid, match="has ended"):
            steer(worker.row)


def test_the_living_come_first_with_what_they_hold(worker: HandWorker, run: TrainingRun) -> None:
    dead = HandWorker()
    workers.stop(dead.row)
    worker.hold(run)
    found = workers.recent(limit=5)
    assert [(row.pk, row.is_alive, row.num_runs) for row in found] == [  # type: ignore[attr-defined]
        (worker.row.pk, True, 1),
        (dead.row.pk, False, 0),
    ]
