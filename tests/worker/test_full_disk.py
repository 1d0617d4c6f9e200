"""A snapshot that cannot be written: training goes on, and it is tried again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from django.core.files.storage import default_storage

from gpuworker import committer
from gpuworker.scheduler import REPLAY_BUDGET_S
from gpuworker.worker import GpuWorker
from runs.models import Operation, Snapshot
from tests.worker.conftest import Client, finished, wait_for

TOKENS = [3, 14, 15, 92, 65, 35]


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
