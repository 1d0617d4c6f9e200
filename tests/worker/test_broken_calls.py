"""What the n-th call sweep has found, each as a test of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpuworker import snapshots
from runs.models import Checkpoint, Metric, Operation
from tests.worker.conftest import Client, Start, finished, wait_for

NewClient = Callable[..., Client]
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]


def curve(client: Client) -> dict[str, float]:
    """Return what is told of the run's only step, but for how long it took."""
    points = Metric.objects.filter(run=client.run).exclude(name__endswith="_s")
    return dict(points.values_list("name", "value"))


def test_a_step_that_two_workers_shared_has_all_of_its_metrics(
    start_worker: Start, new_client: NewClient
) -> None:
    undisturbed, moved = new_client(), new_client()
    worker = start_worker()
    for client in (undisturbed, moved):
        client.forward_backward(TOKENS)
        accumulated = client.forward_backward(TOKENS[:5])
    finished(undisturbed.optim_step())
    finished(accumulated)
    worker.stop()

    start_worker()

    finished(moved.optim_step())
    assert curve(moved) == curve(undisturbed)
    assert curve(moved)["tokens"] == 15


def weights_of(client: Client, name: str) -> Tensor:
    return snapshots.fetch(Checkpoint.objects.get(run=client.run, name=name).directory).weights


def test_nothing_is_built_on_a_gradient_of_a_pass_that_broke_in_the_middle(
    start_worker: Start, new_client: NewClient
) -> None:
    worker = start_worker()
    clients = [new_client(seed=seed) for seed in range(2)]
    for client in clients:
        client.forward_backward(TOKENS)
        finished(client.optim_step())
    seats = worker._intake.seats
    trainer = next(iter(seats.values())).engine._trainer
    calls = iter([True, True])  # the losses of the first pass, and the sum of its gradient
    stack = torch.stack

    def break_in_the_second_pass(tensors: list[Tensor]) -> Tensor:
        if next(calls, False):
            return stack(tensors)
        raise RuntimeError("a kernel broke")

    with worker.scheduler._draining:
        broken = [client.forward_backward(TOKENS) for client in clients]
        kept = [(client.optim_step(), client.save("kept"))[1] for client in clients]
        wait_for(lambda: all(len(seat.queue) == 3 for seat in list(seats.values())), what="all are decoded")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "_token_budget", len(TOKENS))  # so that each run has a pass of its own
            patch.setattr(torch, "stack", break_in_the_second_pass)
            assert not worker.scheduler._cycle()  # nobody's is answered: each is tried by itself
    assert {finished(pk).state for pk in (*broken, *kept)} == {Operation.State.DONE}

    for client in clients:
        worker.give_up(client.run.pk)
        finished(client.save("rebuilt"))
        assert torch.equal(weights_of(client, "rebuilt"), weights_of(client, "kept"))
