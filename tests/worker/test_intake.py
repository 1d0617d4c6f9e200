"""How a worker shares runs with another: it lets go what is too much, once, and counts only when there is something to take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from django.db import connection
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext

from gpuworker import intake
from gpuworker.leases import Lease
from gpuworker.worker import GpuWorker
from runs.models import Operation, Worker
from runs.services import workers
from tests.worker.conftest import MODEL, Client, finished, wait_for
from tests.worker.test_device_share import TOKENS

NUM_RUNS = 8


@pytest.fixture
def other(transactional_db: None) -> Iterator[Worker]:
    """Return a row that looks like another live worker until the end."""
    row = workers.register(device="cpu", dtype="float32")
    Worker.objects.filter(pk=row.pk).update(lease_until=Now() + timedelta(days=1))  # nobody renews it
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s, %s)", [workers.LOCK_CLASS, row.pk])
        yield row
        cursor.execute("SELECT pg_advisory_unlock(%s, %s)", [workers.LOCK_CLASS, row.pk])


@pytest.fixture
def busy_worker(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client], other: Worker
) -> GpuWorker:
    """Return a worker with all runs, when the other one has just loaded the base model."""
    worker = start_worker()
    looks = [new_client(seed=seed).forward_backward(TOKENS) for seed in range(NUM_RUNS)]
    for look in looks:
        finished(look)
    workers.describe(other, device="cpu", dtype="float32", fingerprints={MODEL: {"torch": "2"}})
    worker._intake.wake()
    wait_for(lambda: worker._intake._has_company, what="it is noticed")
    return worker


def test_what_is_about_to_leave_counts_and_takes_nothing_more(
    busy_worker: GpuWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = busy_worker._intake
    with busy_worker.scheduler._draining:
        monkeypatch.setattr(intake, "SETTLE_S", 0.0)
        for _ in range(3):
            held._balance()
        leaving = {pk for pk, seat in held.seats.items() if seat.is_leaving}
        assert len(leaving) == NUM_RUNS // 2
        open_seats, _ = held._room()
        assert {seat.run.pk for seat in open_seats} == set(held.seats) - leaving


def test_nothing_is_counted_while_no_run_is_free(busy_worker: GpuWorker) -> None:
    held = list(busy_worker._intake.seats)
    with CaptureQueriesContext(connection) as queries:
        busy_worker._intake._claim(held)
    assert not any("count(" in query["sql"] for query in queries.captured_queries)


def test_many_runs_that_come_at_once_are_decoded_as_far_as_any_are(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start_worker()
    clients = [new_client(seed=seed) for seed in range(NUM_RUNS)]
    for client in clients:
        finished(client.forward_backward(TOKENS))
    held, drive = worker._intake, worker.scheduler
    held.stop()
    passes = [client.forward_backward(TOKENS) for client in clients for _ in range(3)]
    size = Operation.objects.get(pk=passes[0]).num_tokens
    monkeypatch.setattr(intake, "AHEAD_TOKENS", NUM_RUNS * size + 1)
    with drive._draining:
        held._collect()
        num_ahead = sorted(len(seat.queue) for seat in held.seats.values())
        assert num_ahead == [1] * (NUM_RUNS - 1) + [2]
        assert all(seat.may_have_more for seat in held.seats.values())
        while Operation.objects.filter(state=Operation.State.QUEUED).exists():
            assert drive._cycle()
            worker._committer.flush()
            held._collect()
    assert all(finished(number).state == Operation.State.DONE for number in passes)


def test_a_run_with_much_waiting_keeps_no_other_from_beginning(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start_worker()
    much, little = (new_client(seed=seed) for seed in range(2))
    for client in (much, little):
        finished(client.forward_backward(TOKENS))
    held = worker._intake
    held.stop()
    size = Operation.objects.get(pk=much.forward_backward(TOKENS)).num_tokens
    monkeypatch.setattr(intake, "AHEAD_TOKENS", 2 * size)
    for _ in range(intake.AHEAD):
        much.forward_backward(TOKENS)
    with worker.scheduler._draining:
        held._collect()
        queues = [held.seats[client.run.pk].queue for client in (much, little)]
        assert [len(queue) for queue in queues] == [2, 0]
        little.forward_backward(TOKENS)
        little.forward_backward(TOKENS)
        held._collect()
        assert [len(queue) for queue in queues] == [2, 1]


def test_what_waits_of_a_run_that_is_put_off_takes_no_room(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start_worker()
    stuck, healthy = (new_client(seed=seed) for seed in range(2))
    for client in (stuck, healthy):
        finished(client.forward_backward(TOKENS))
    held = worker._intake
    held.stop()
    numbers = [client.forward_backward(TOKENS) for client in (stuck, healthy) for _ in range(3)]
    monkeypatch.setattr(intake, "AHEAD_TOKENS", Operation.objects.get(pk=numbers[0]).num_tokens * 3)
    with worker.scheduler._draining:
        held.seats[healthy.run.pk].is_leaving = True
        held._collect()
        held.seats[healthy.run.pk].is_leaving = False
        held.seats[stuck.run.pk].restoring.again()
        held._collect()
        assert [len(held.seats[client.run.pk].queue) for client in (stuck, healthy)] == [3, 3]
        stuck.forward_backward(TOKENS)
        held._collect()
        assert len(held.seats[stuck.run.pk].queue) == 3


def test_a_worker_that_lost_its_connections_waits_before_it_finds_others_dead(
    start_worker: Callable[[], GpuWorker], other: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "SWEEP_S", 0.05)
    worker = start_worker()
    wait_for(lambda: worker._intake._looked_at, what="intake has a connection")
    troubled_at = worker._intake._troubled_at
    monkeypatch.setattr(workers, "RETURN_GRACE_S", 3600)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
    wait_for(lambda: worker._intake._troubled_at > troubled_at, what="it is noticed")
    assert not worker._intake._may_find_dead
    monkeypatch.setattr(workers, "RETURN_GRACE_S", 0)
    wait_for(lambda: worker._intake._may_find_dead, what="it is over")


def test_others_are_found_dead_only_while_the_database_is_heard_steadily(
    start_worker: Callable[[], GpuWorker], other: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lease, "is_steady", False)
    monkeypatch.setattr(intake, "SWEEP_S", 0.05)
    start_worker()
    Worker.objects.filter(pk=other.pk).update(lease_until=Now())
    time.sleep(1)
    assert Worker.objects.get(pk=other.pk).stopped_at is None
    monkeypatch.setattr(Lease, "is_steady", True)
    wait_for(lambda: Worker.objects.get(pk=other.pk).stopped_at, what="the dead worker is found")
