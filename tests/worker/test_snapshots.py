"""When a run's state is kept: so often that recovery is short, so seldom that it costs little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from django.core.files.storage import default_storage

from gpuworker.scheduler import REPLAY_BUDGET_S, REPLAY_TOGETHER_S, SNAPSHOT_SHARE
from gpuworker.worker import GpuWorker
from runs.models import Snapshot
from tests.worker.conftest import Client, finished, wait_for

TOKENS = [3, 14, 15, 92, 65, 35]
A_SECOND = SNAPSHOT_SHARE * 1.0  # what keeping a state may cost that is kept after each second of computing


# What falls short does so by more than a busy machine takes for the step that comes on top.
@pytest.mark.parametrize(
    ("num_runs", "cost_s", "computed_s", "is_kept"),
    [
        (1, 0.0, 0.6 * REPLAY_TOGETHER_S, False),
        (1, 0.0, 1.1 * REPLAY_TOGETHER_S, True),
        (4, 0.0, 0.3 * REPLAY_TOGETHER_S, True),
        (4, 10 * A_SECOND, 8.0, False),
        (4, 10 * A_SECOND, 11.0, True),
        (4, 1000 * A_SECOND, 0.9 * REPLAY_BUDGET_S, False),
        (4, 1000 * A_SECOND, 1.1 * REPLAY_BUDGET_S, True),
    ],
)
def test_a_state_is_kept_when_its_replay_gets_long(
    num_runs: int,
    cost_s: float,
    computed_s: float,
    is_kept: bool,
    start_worker: Callable[[], GpuWorker],
    new_client: Callable[..., Client],
) -> None:
    worker = start_worker()
    clients = [new_client() for _ in range(num_runs)]
    for client in clients:
        finished(client.forward_backward(TOKENS))
    run = clients[0].run
    seat = worker._intake.seats[run.pk]
    seat.replay_cost_s, seat.snapshot_cost_s = computed_s, cost_s

    finished(clients[0].optim_step())
    worker._committer.flush()

    assert Snapshot.objects.filter(run=run).exists() == is_kept
    if is_kept:
        assert cost_s != seat.snapshot_cost_s < REPLAY_BUDGET_S
        assert seat.replay_cost_s < computed_s


def test_a_state_that_could_not_be_kept_is_not_tried_again_at_once(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client]
) -> None:
    worker, client = start_worker(), new_client()
    finished(client.forward_backward(TOKENS))
    seat = worker._intake.seats[client.run.pk]
    in_the_way = Path(default_storage.path("snapshots")) / str(client.run.pk)
    in_the_way.parent.mkdir(parents=True, exist_ok=True)
    in_the_way.touch()
    seat.replay_cost_s = REPLAY_BUDGET_S
    finished(client.optim_step())
    wait_for(lambda: 0 < seat.replay_cost_s < REPLAY_BUDGET_S, what="it was tried in vain")
    in_the_way.unlink()

    finished(client.forward_backward(TOKENS))
    worker._committer.flush()

    assert not Snapshot.objects.filter(run=client.run).exists()
