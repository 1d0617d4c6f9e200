"""A device that is stuck: noticed, and the worker does not go on to look alive."""

from __future__ import annotations

import threading

import pytest

from gpuworker.busy import BusyMeter
from gpuworker.leases import Lease
from runs.models import Worker
from runs.services import workers


@pytest.fixture
def row(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(workers, "HEARTBEAT_S", 0.05)
    return workers.register(device="cpu", dtype="float32")


def test_it_is_stuck_only_while_something_takes_long() -> None:
    meter = BusyMeter()
    assert meter.stuck_s() == 0
    with meter.measuring():
        threading.Event().wait(0.05)
        assert meter.stuck_s() >= 0.05
        meter.beat()
        assert meter.stuck_s() < 0.05
    assert meter.stuck_s() == 0


def test_a_stuck_worker_is_ended_instead_of_renewed(row: Worker) -> None:
    stuck, ended, lost = threading.Event(), threading.Event(), threading.Event()
    lease = Lease(row, busy_share=lambda: 1.0, is_stuck=stuck.is_set, on_lost=lost.set, on_stuck=ended.set)
    try:
        assert not ended.wait(0.2)
        stuck.set()
        assert ended.wait(5)
        until = Worker.objects.get(pk=row.pk).lease_until
        threading.Event().wait(0.2)
        assert Worker.objects.get(pk=row.pk).lease_until == until
        assert not lost.is_set()
    finally:
        lease.stop()
