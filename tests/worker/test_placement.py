"""Two real workers on one database share the runs, take each other's over, and share again."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable

from django.db.models import Count

from runs.models import RunEvent, TrainingRun
from tests.worker.conftest import LONG_S, Client, StartProcess, finished, losses_of, wait_for

NUM_RUNS = 8


def tokens_of(seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 128), k=10)


def train(clients: list[Client], *, number: int) -> list[float]:
    """Train every run for a step and return the losses after it."""
    looks = []
    for seed, client in enumerate(clients):
        client.forward_backward(tokens_of(seed + number))
        client.optim_step()
        looks.append(client.forward_backward(tokens_of(seed), forward_only=True))
    return [losses_of(finished(look, deadline_s=LONG_S)) for look in looks]


def wait_until_even(clients: list[Client]) -> None:
    """Look at the losses, which changes no run, until both workers hold half of the runs: at once or by moves."""
    mine = [client.run.pk for client in clients]

    def is_even() -> bool:
        for client in clients:
            finished(client.forward_backward(tokens_of(0), forward_only=True), deadline_s=LONG_S)
        held = TrainingRun.objects.filter(pk__in=mine, worker__isnull=False)
        counts = held.values_list("worker_id").annotate(num=Count("pk"))
        return sorted(num for _, num in counts) == [NUM_RUNS // 2, NUM_RUNS // 2]

    wait_for(is_even, what="the runs are spread evenly", deadline_s=LONG_S)


def test_two_workers_share_the_runs_and_one_alone_gives_the_same_bits(
    start_process: StartProcess, new_client: Callable[..., Client]
) -> None:
    first = start_process()
    expected = [new_client(seed=seed) for seed in range(NUM_RUNS)]
    alone = [train(expected, number=number) for number in range(3)]
    TrainingRun.objects.filter(pk__in=[client.run.pk for client in expected]).update(last_applied_at=None)
    second = start_process()

    clients = [new_client(seed=seed) for seed in range(NUM_RUNS)]
    assert train(clients, number=0) == alone[0]
    wait_until_even(clients)
    mine = [client.run.pk for client in clients]

    second.send_signal(signal.SIGKILL)
    second.wait()
    assert train(clients, number=1) == alone[1]
    assert set(TrainingRun.objects.filter(pk__in=mine).values_list("worker__pid", flat=True)) == {first.pid}

    third = start_process()
    first.send_signal(signal.SIGTERM)  # in order: what it holds is kept and set free
    assert train(clients, number=2) == alone[2]
    assert first.wait(LONG_S) == 0
    assert set(TrainingRun.objects.filter(pk__in=mine).values_list("worker__pid", flat=True)) == {third.pid}
    assert not RunEvent.objects.filter(kind="diverged").exists()


def test_a_worker_that_comes_gets_some_of_the_runs_and_keeps_them(
    start_process: StartProcess, new_client: Callable[..., Client]
) -> None:
    first = start_process()
    clients = [new_client(seed=seed) for seed in range(NUM_RUNS)]
    before = train(clients, number=0)
    start_process()
    wait_until_even(clients)
    owners = list(TrainingRun.objects.order_by("pk").values_list("worker_id", "fence"))
    for _ in range(3):
        after = train(clients, number=0)
    assert list(TrainingRun.objects.order_by("pk").values_list("worker_id", "fence")) == owners
    assert first.poll() is None
    assert after != before
