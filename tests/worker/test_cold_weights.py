"""Weights of a sampling session that lie in storage: nobody waits for their reading but who samples from them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from django.core.files.storage import default_storage

from gpuworker import cold_weights
from gpuworker.engine import checkpoints
from gpuworker.sample_intake import HELD_PER_SLOT
from gpuworker.suspicion import ATTEMPTS_TOGETHER
from runs.models import Checkpoint, Operation, User
from runs.schemas import results
from runs.services import workers
from tests.worker.conftest import Client, Start, finished, wait_for
from tests.worker.test_device_share import TOKENS, ask
from tests.worker.test_put_off import trained, unreadable

NewClient = Callable[..., Client]
NUM_TOKENS = 12


@pytest.fixture
def checkpoint(start_worker: Start, new_client: NewClient) -> Checkpoint:
    """Weights that no worker holds."""
    client = new_client()
    worker = start_worker()
    trained(client)
    finished(client.save("kept"))
    worker.stop()
    return Checkpoint.objects.get(name="kept")


def sampled(operation_pk: int) -> list[int]:
    """Return the tokens of a sample that is done."""
    operation = finished(operation_pk)
    assert operation.state == Operation.State.DONE, operation.error
    tokens: list[int] = results.decode_sample(bytes(operation.result or b"")).sequences[0].tokens.tolist()
    return tokens


def state_file(checkpoint: Checkpoint) -> Path:
    return Path(default_storage.path(f"{checkpoint.directory}/{checkpoints.STATE_FILE}"))


def test_training_and_other_samples_go_on_while_weights_are_read(
    checkpoint: Checkpoint, start_worker: Start, new_client: NewClient, alice: User, base_model: str
) -> None:
    path = state_file(checkpoint)
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)  # opening it takes until somebody writes
    start_worker()
    waits = [ask(alice, base_model, num_tokens=NUM_TOKENS, checkpoint=checkpoint) for _ in range(2)]
    wait_for(lambda: Operation.objects.exclude(worker=None).filter(pk__in=waits).count() == 2, what="taken")

    finished(trained(new_client(seed=2)))
    assert len(sampled(ask(alice, base_model, num_tokens=NUM_TOKENS))) == NUM_TOKENS
    assert Operation.objects.filter(pk__in=waits, state=Operation.State.QUEUED).count() == 2

    path.write_bytes(content)  # to the reader that waits
    path.unlink()
    path.write_bytes(content)
    first, second = (sampled(waiting) for waiting in waits)
    assert first == second
    assert sampled(ask(alice, base_model, num_tokens=NUM_TOKENS, checkpoint=checkpoint)) == first


def test_of_samples_to_be_tried_alone_one_is_counted_and_once_though_its_weights_have_to_be_read(
    checkpoint: Checkpoint, start_worker: Start, new_client: NewClient, alice: User, base_model: str
) -> None:
    path = state_file(checkpoint)
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    waits = [ask(alice, base_model, num_tokens=NUM_TOKENS, checkpoint=checkpoint) for _ in range(3)]
    Operation.objects.filter(pk__in=waits).update(attempts=ATTEMPTS_TOGETHER)

    def counts() -> list[int]:
        return sorted(Operation.objects.filter(pk__in=waits).values_list("lone_attempts", flat=True))

    start_worker()
    wait_for(lambda: any(counts()), what="one is tried")
    finished(trained(new_client(seed=2)))
    assert counts() == [0, 0, 1]

    path.write_bytes(content)  # to the reader that waits
    path.unlink()
    path.write_bytes(content)
    for waiting in waits:
        sampled(waiting)
    assert counts() == [1, 1, 1]


def test_a_sample_waits_for_weights_that_cannot_be_read_just_now(
    checkpoint: Checkpoint, start_worker: Start, new_client: NewClient, alice: User, base_model: str
) -> None:
    worker = start_worker()
    with unreadable(f"{checkpoint.directory}/{checkpoints.STATE_FILE}"):
        waits = ask(alice, base_model, num_tokens=NUM_TOKENS, checkpoint=checkpoint)
        wait_for(lambda: worker._intake.samples.num_unread, what="it is put off")
        finished(trained(new_client(seed=2)))
        assert Operation.objects.get(pk=waits).state == Operation.State.QUEUED
    assert len(sampled(waits)) == NUM_TOKENS
    assert not worker._intake.samples.num_unread


def test_a_sample_whose_workers_died_is_counted_anew_when_it_comes_again(
    checkpoint: Checkpoint, start_worker: Start, alice: User, base_model: str
) -> None:
    with unreadable(f"{checkpoint.directory}/{checkpoints.STATE_FILE}"):
        waits = ask(alice, base_model, num_tokens=NUM_TOKENS, checkpoint=checkpoint)
        Operation.objects.filter(pk=waits).update(attempts=ATTEMPTS_TOGETHER)
        worker = start_worker()
        wait_for(lambda: worker._intake.samples.num_unread, what="it is put off")
    assert len(sampled(waits)) == NUM_TOKENS
    assert Operation.objects.get(pk=waits).lone_attempts == 1  # entered before it is drawn by itself


def test_weights_that_cannot_be_read_take_no_place_from_other_samples(
    checkpoint: Checkpoint, start_worker: Start, alice: User, base_model: str
) -> None:
    worker = start_worker()
    (engine,) = worker.scheduler._engines.values()
    engine.num_slots = 1
    with unreadable(f"{checkpoint.directory}/{checkpoints.STATE_FILE}"):
        waits = [
            ask(alice, base_model, num_tokens=NUM_TOKENS, checkpoint=checkpoint)
            for _ in range(2 * HELD_PER_SLOT)
        ]
        wait_for(lambda: worker._intake.samples.num_unread, what="some are put off")
        assert len(sampled(ask(alice, base_model, num_tokens=NUM_TOKENS))) == NUM_TOKENS
        attempts = Operation.objects.filter(pk__in=waits).values_list("attempts", flat=True)
        assert max(attempts) <= 1
        assert Operation.objects.filter(pk__in=waits, state=Operation.State.QUEUED).count() == len(waits)
    tokens = [sampled(waiting) for waiting in waits]
    assert tokens == tokens[:1] * len(waits)


def test_a_drained_worker_leaves_samples_that_it_cannot_read_to_another(
    checkpoint: Checkpoint, start_worker: Start, alice: User, base_model: str
) -> None:
    worker = start_worker()
    with unreadable(f"{checkpoint.directory}/{checkpoints.STATE_FILE}"):
        waits = ask(alice, base_model, num_tokens=NUM_TOKENS, checkpoint=checkpoint)
        wait_for(lambda: worker._intake.samples.num_unread, what="it is put off")
        workers.drain(worker.row)
        wait_for(lambda: Operation.objects.filter(pk=waits, worker=None).exists(), what="it is given back")
    other = start_worker()
    assert len(sampled(waits)) == NUM_TOKENS
    assert Operation.objects.get(pk=waits).worker == other.row


def test_every_sample_is_told_that_its_weights_are_torn(
    checkpoint: Checkpoint, start_worker: Start, alice: User, base_model: str
) -> None:
    state_file(checkpoint).write_bytes(b"{")
    start_worker()
    asked = [ask(alice, base_model, num_tokens=NUM_TOKENS, checkpoint=checkpoint) for _ in range(3)]
    errors = {finished(pk).error for pk in asked}
    assert len(errors) == 1
    assert "state.json cannot be read" in errors.pop()
    assert len(sampled(ask(alice, base_model, num_tokens=NUM_TOKENS))) == NUM_TOKENS


def test_more_weights_are_wanted_at_once_than_are_read_ahead(
    checkpoint: Checkpoint, start_worker: Start, new_client: NewClient, alice: User, base_model: str
) -> None:
    worker = start_worker()
    client = new_client(seed=3)
    trained(client)
    names = [f"kept-{number}" for number in range(cold_weights._READ_AHEAD + 2)]
    for name in names:
        finished(client.save(name))
    worker.stop()
    worker = start_worker()
    with worker.scheduler._draining:
        asked = [
            ask(alice, base_model, num_tokens=NUM_TOKENS, checkpoint=Checkpoint.objects.get(name=name))
            for name in names
        ]
        wait_for(lambda: worker._intake.samples.num_waiting == len(names), what="all are taken")
    tokens = [sampled(one) for one in asked]
    assert tokens == tokens[:1] * len(names)  # they are the same weights
    finished(client.forward_backward(TOKENS))
