"""A snapshot that cannot be written: training goes on, and it is tried again; what it was to make room for waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from pytest_django.fixtures import Settings

from gpuworker import committer
from gpuworker.scheduler import REPLAY_BUDGET_S
from gpuworker.worker import GpuWorker
from runs.models import Operation, Snapshot, TrainingRun
from tests.no_room import no_room
from tests.worker.conftest import Client, Start, finished, losses_of, wait_for
from tests.worker.test_put_off import trained, wait_until_put_off

NewClient = Callable[..., Client]
TOKENS = [3, 14, 15, 92, 65, 35]
# Two adapters of this rank have room in a megabyte, and the files of none are as short as this.
RANK, ROOM_MB, NO_ROOM_BYTES = 24, 1, 100_000
NOT_WRITTEN = "the states of other runs, which make room for it, cannot be written"


def test_a_snapshot_that_could_not_be_written_is_tried_again(
    start_worker: Callable[[], GpuWorker],
    new_client: Callable[..., Client],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(committer, "_UNWRITTEN_COST_S", REPLAY_BUDGET_S)
    client, worker = new_client(), start_worker()
    assert finished(client.forward_backward(TOKENS)).state == Operation.State.DONE
    in_the_way = Path(default_storage.path("snapshots")) / str(client.run.pk)
    in_the_way.parent.mkdir(parents=True, exist_ok=True)
    in_the_way.touch()
    seat = worker._intake.seats[client.run.pk]
    seat.replay_cost_s = REPLAY_BUDGET_S

    assert finished(client.optim_step()).state == Operation.State.DONE
    wait_for(lambda: seat.replay_cost_s >= REPLAY_BUDGET_S, what="the snapshot is due again")
    assert not Snapshot.objects.filter(run=client.run).exists()
    in_the_way.unlink()
    assert finished(client.forward_backward(TOKENS)).state == Operation.State.DONE

    wait_for(lambda: Snapshot.objects.filter(run=client.run).exists(), what="the snapshot is there")


@pytest.fixture
def full_worker(start_worker: Start, settings: Settings) -> GpuWorker:
    """Return a worker whose memory has room for two adapters."""
    settings.ADAPTER_MEMORY_MB = ROOM_MB
    return start_worker()


def shelved_in_memory(worker: GpuWorker) -> set[int]:
    """Return the runs whose states wait in memory to be written."""
    return {pk for pk, seat in list(worker._intake.seats.items()) if seat.unwritten is not None}


def test_a_run_that_cannot_be_shelved_keeps_its_state_in_memory(
    full_worker: GpuWorker, new_client: NewClient
) -> None:
    client, undisturbed = new_client(rank=RANK), new_client(rank=RANK)
    finished(trained(client))
    finished(trained(undisturbed))
    with no_room(limit_bytes=NO_ROOM_BYTES):
        finished(trained(new_client(rank=RANK)))  # in the place of the first
        wait_for(lambda: client.run.pk in shelved_in_memory(full_worker), what="its state waits")
        waits = new_client(rank=RANK)
        waiting = Operation.objects.get(run=waits.run).pk
        wait_until_put_off(full_worker, waits, why=NOT_WRITTEN)
        goes_on = finished(client.forward_backward(TOKENS))  # in the place of another
        assert Operation.objects.get(pk=waiting).state == Operation.State.QUEUED
    assert finished(waiting).state == Operation.State.DONE
    assert losses_of(goes_on) == losses_of(finished(undisturbed.forward_backward(TOKENS)))
    wait_for(lambda: not shelved_in_memory(full_worker), what="all is written or in use")
    runs = TrainingRun.objects.filter(pk__in=full_worker._intake.seats)
    assert list(runs.values_list("fence", flat=True)) == [1] * 4


def test_a_state_that_waits_in_memory_is_written_before_its_worker_stops(
    full_worker: GpuWorker, new_client: NewClient
) -> None:
    client = new_client(rank=RANK)
    finished(trained(client))
    with no_room(limit_bytes=NO_ROOM_BYTES):
        for _ in range(2):
            finished(trained(new_client(rank=RANK)))
        wait_for(lambda: client.run.pk in shelved_in_memory(full_worker), what="its state waits")
    full_worker.stop()
    run = TrainingRun.objects.get(pk=client.run.pk)
    assert Snapshot.objects.get(run=run).seq == run.applied_seq
