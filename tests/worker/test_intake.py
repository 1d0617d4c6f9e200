"""How a worker shares runs with another: it lets go what is too much, once, and counts only when there is something to take."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from gpuworker import intake
from gpuworker.worker import GpuWorker
from runs.models import Worker
from runs.services import workers
from tests.worker.conftest import MODEL, Client, finished, wait_for
from tests.worker.test_device_share import TOKENS

NUM_RUNS = 8


@pytest.fixture
def other(transactional_db: None) -> Iterator[Worker]:
    """Return a row that looks like another live worker until the end."""
    row = workers.register(device="cpu", dtype="float32")
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
        assert set(held._room()) == set(held.seats) - leaving


def test_nothing_is_counted_while_no_run_is_free(busy_worker: GpuWorker) -> None:
    held = list(busy_worker._intake.seats)
    with CaptureQueriesContext(connection) as queries:
        busy_worker._intake._claim(held)
    assert not any("count(" in query["sql"] for query in queries.captured_queries)
