"""A device that is stuck: noticed, and the worker does not go on to look alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.db import transaction
from pytest_django.fixtures import Settings

from gpuworker import leases
from gpuworker.busy import BusyMeter
from gpuworker.leases import Lease
from gpuworker.worker import GpuWorker
from runs.models import Worker
from runs.services import workers
from tests.worker.conftest import Client, finished, wait_for
from tests.worker.test_device_share import TOKENS


@pytest.fixture
def row(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(workers, "HEARTBEAT_S", 0.05)
    return workers.register(device="cpu", dtype="float32")


def lease_of(row: Worker, **callbacks: Callable[[], Any]) -> Lease:
    """Return a lease; what is not said does nothing."""
    nothing: dict[str, Callable[[], Any]] = dict.fromkeys(("on_lost", "on_stuck", "on_hung"), lambda: None)
    unremarkable = {"busy_share": lambda: 1.0, "is_stuck": lambda: False}
    return Lease(row, **{**nothing, **unremarkable, **callbacks})


def test_it_is_stuck_only_while_something_takes_long() -> None:
    meter = BusyMeter()
    assert meter.stuck_s() == 0
    with meter.measuring():
        threading.Event().wait(0.05)
        assert meter.stuck_s() >= 0.05
        before = time.monotonic()
        meter.beat()
        assert meter.stuck_s() <= time.monotonic() - before
    assert meter.stuck_s() == 0


def test_a_stuck_worker_is_ended_instead_of_renewed(row: Worker) -> None:
    stuck, ended, lost = threading.Event(), threading.Event(), threading.Event()
    lease = lease_of(row, is_stuck=stuck.is_set, on_lost=lost.set, on_stuck=ended.set, on_hung=lost.set)
    try:
        assert not ended.wait(0.2)
        stuck.set()
        assert ended.wait(60)
        until = Worker.objects.get(pk=row.pk).lease_until
        threading.Event().wait(0.2)
        assert Worker.objects.get(pk=row.pk).lease_until == until
        assert not lost.is_set()
    finally:
        lease.stop()


def test_connections_that_are_held_open_notice_a_vanished_server(row: Worker) -> None:
    lease = lease_of(row)
    parameters = lease._lock_connection.info.get_parameters()
    lease.stop()
    assert parameters["tcp_user_timeout"] == "10000"
    assert parameters["keepalives_idle"] == "5"


def test_a_worker_whose_database_was_away_waits_before_it_judges_others(
    row: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "RETURN_GRACE_S", 1.0)
    lease = lease_of(row)
    try:
        assert lease.is_steady
        lease._lock_connection.close()
        wait_for(lambda: not lease.is_steady, what="the break is noticed")
        noticed_at = time.monotonic()
        wait_for(lambda: lease.is_steady, what="it is steady again")
        assert time.monotonic() - noticed_at > 0.8
    finally:
        lease.stop()


def test_a_worker_whose_renewal_hangs_is_ended(row: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HUNG_S", 3.0)  # a busy machine may take long over a renewal
    hung, other = threading.Event(), threading.Event()
    lease = lease_of(row, on_lost=other.set, on_stuck=other.set, on_hung=hung.set)
    try:
        assert not hung.wait(4)  # renewals in time
        with transaction.atomic():
            Worker.objects.select_for_update().get(pk=row.pk)
            assert hung.wait(60)
    finally:
        lease.stop()
    assert not other.is_set()


def test_what_waits_for_a_database_that_is_away_is_not_stuck(
    start_worker: Callable[[], GpuWorker], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr("gpuworker.worker._end_stuck_process", ended.set)
    monkeypatch.setattr(workers, "HEARTBEAT_S", 0.05)
    settings.HANG_S = 3
    worker = start_worker()
    with worker.scheduler._draining, worker._busy.measuring():
        for _ in range(20):
            worker._lease._lock_connection.close()
            assert not ended.wait(0.2)
        assert ended.wait(60)


def test_a_pass_of_many_batches_beats_after_each(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, client = start_worker(), new_client()
    finished(client.forward_backward(TOKENS))
    (engine,) = worker.scheduler._engines.values()
    trainer, beats = engine._trainer, list[float | None]()
    run_batch = trainer._run_batch

    def note_and_run(parts: Any) -> None:
        beats.append(worker._busy._moved_at)
        run_batch(parts)

    monkeypatch.setattr(trainer, "_run_batch", note_and_run)
    monkeypatch.setattr(trainer, "_token_budget", len(TOKENS))
    with worker.scheduler._draining:
        passes = [client.forward_backward(TOKENS) for _ in range(3)]
        seat = worker._intake.seats[client.run.pk]
        wait_for(lambda: len(seat.queue) == len(passes), what="all are decoded")
        with worker._busy.measuring():
            assert worker.scheduler._cycle()
    assert len(set(beats)) == len(passes)
