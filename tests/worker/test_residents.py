"""A worker that holds more runs than fit into its memory shelves some on the disk; no bit of any of them changes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from pytest_django.fixtures import Settings

from gpuworker import intake
from gpuworker.busy import BusyMeter
from gpuworker.committer import Committer
from gpuworker.engine import checkpoints
from gpuworker.residents import Residents
from gpuworker.seats import Seat
from gpuworker.worker import GpuWorker
from runs.models import Checkpoint, Operation, RunEvent, Snapshot, TrainingRun
from runs.services import claims, workers
from tests.worker.conftest import Client, Start, finished, losses_of, wait_for

NewClient = Callable[..., Client]
NUM_RUNS, NUM_ROUNDS, NUM_FITTING = 60, 3, 6
# An adapter of this rank on the random model takes 512 KiB with its moments and gradient.
RANK, ROOM_MB = 32, 3


@pytest.fixture
def little_room(settings: Settings) -> None:
    settings.ADAPTER_MEMORY_MB = ROOM_MB


def tokens_of(seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 128), k=8 + seed % 5)


def train(client: Client, seed: int, *, round_number: int) -> int:
    """Submit one round: a gradient of two passes, and a step."""
    client.forward_backward(tokens_of(seed))
    client.forward_backward(tokens_of(seed + round_number))
    return client.optim_step()


def in_memory(worker: GpuWorker) -> int:
    """Return how many adapters the worker has in memory."""
    seats = list(worker._intake.seats.values())
    return sum(seat.engine.has_adapter(seat.adapter_id) for seat in seats)


def finish_all(numbers: Sequence[int], worker: GpuWorker) -> int:
    """Return the most adapters that were in memory while these operations came to their end."""
    most = 0

    def are_done() -> bool:
        nonlocal most
        most = max(most, in_memory(worker))
        waiting = Operation.objects.filter(pk__in=numbers, state=Operation.State.QUEUED)
        return not waiting.exists()

    wait_for(are_done, what=f"{len(numbers)} operations")
    failed = Operation.objects.filter(pk__in=numbers, state=Operation.State.FAILED)
    assert not failed.values_list("error", flat=True)
    return most


def digests(client: Client) -> dict[str, str]:
    """Return the SHA-256 of the weights and of the optimizer's state that the run saved last."""
    checkpoint = Checkpoint.objects.get(run=client.run)
    state = Path(default_storage.path(checkpoint.directory)) / checkpoints.STATE_FILE
    files: dict[str, str] = json.loads(state.read_text())["files"]
    return files


@pytest.mark.usefixtures("little_room")
def test_many_runs_share_room_for_few_and_end_with_the_bits_of_runs_alone(
    start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    worker = start_worker()
    clients = [new_client(seed=seed, rank=RANK) for seed in range(NUM_RUNS)]
    order, most = random.Random(7), 0
    for round_number in range(NUM_ROUNDS):
        chosen = order.sample(range(NUM_RUNS), NUM_RUNS)
        most = max(
            most,
            finish_all([train(clients[seed], seed, round_number=round_number) for seed in chosen], worker),
        )
    finish_all([client.save("end") for client in clients], worker)
    assert 1 < most <= NUM_FITTING
    assert not RunEvent.objects.exclude(kind="saved").exists()  # shelving is no recovery
    worker.stop()

    settings.ADAPTER_MEMORY_MB = 0
    alone = start_worker()
    for seed in range(0, NUM_RUNS, 10):
        client = new_client(seed=seed, rank=RANK)
        for round_number in range(NUM_ROUNDS):
            train(client, seed, round_number=round_number)
        finish_all([client.save("end")], alone)
        assert digests(client) == digests(clients[seed])


@pytest.mark.usefixtures("little_room")
def test_a_shelved_run_whose_state_is_damaged_is_rebuilt_from_the_log(
    start_worker: Start, new_client: NewClient
) -> None:
    worker = start_worker()
    undisturbed, damaged = new_client(rank=RANK), new_client(rank=RANK)
    for client in (undisturbed, damaged):
        finish_all([train(client, 1, round_number=0)], worker)
    others = [new_client(seed=seed, rank=RANK) for seed in range(NUM_FITTING)]
    for client in others:
        finish_all([train(client, 2, round_number=0)], worker)
    snapshot = wait_for(lambda: Snapshot.objects.filter(run=damaged.run).first(), what="the run is shelved")
    (Path(default_storage.path(snapshot.directory)) / checkpoints.STATE_FILE).unlink()

    answers = [client.forward_backward(tokens_of(3)) for client in (undisturbed, damaged)]

    expected, rebuilt = (losses_of(finished(answer)) for answer in answers)
    assert rebuilt == expected
    assert TrainingRun.objects.get(pk=damaged.run.pk).fence == 2
    assert TrainingRun.objects.get(pk=undisturbed.run.pk).fence == 1


def test_a_run_shelved_right_after_it_was_restored_is_taken_back(
    start_worker: Start, new_client: NewClient
) -> None:
    worker, client = start_worker(), new_client()
    finish_all([train(client, 1, round_number=0)], worker)
    worker.stop()
    client.forward_backward(tokens_of(1))  # so that it is claimed
    row = workers.register(device="cpu", dtype="float32")
    (run,) = claims.claim_runs(row, [client.run.base_model])
    seat = Seat(run, worker.scheduler._engines[run.base_model])
    committer = Committer(on_lost=lambda: None, on_sample_end=lambda _: None)
    residents = Residents(committer, BusyMeter())
    residents._bring_back(seat)
    residents._shelve(seat)
    residents._bring_back(seat)
    committer.stop()
    assert seat.is_restored
    assert not seat.is_lost


def test_what_is_decoded_ahead_of_compute_is_bounded(
    start_worker: Start, new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "AHEAD_TOKENS", 1)
    worker = start_worker()
    clients = [new_client(seed=seed) for seed in range(4)]
    numbers = [train(client, 1, round_number=number) for client in clients for number in range(6)]
    finish_all(numbers, worker)


@pytest.mark.usefixtures("little_room")
def test_a_run_that_alone_exceeds_the_room_is_trained(
    start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    settings.ADAPTER_MEMORY_MB = 1
    worker = start_worker()
    small, big = new_client(rank=16), new_client(rank=RANK)
    worker_room = worker.scheduler._engines[big.run.base_model].adapter_room_bytes
    for client in (small, big, small, big):
        finish_all([train(client, 1, round_number=0)], worker)
    assert worker_room == 1 << 20
