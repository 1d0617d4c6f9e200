"""Weights to sample from are answered before their file is there; a worker that dies in between takes nothing with it."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from django.core.files.storage import default_storage

from gpuworker import committer, snapshots
from gpuworker.worker import GpuWorker
from runs.models import Checkpoint, Operation, RunEvent, SamplingSession, TrainingRun
from runs.schemas import results
from runs.services import early_answers
from tests.worker.conftest import DEADLINE_S, LONG_S, Client, StartProcess, finished, losses_of, wait_for
from tests.worker.test_operations import _sample
from tests.worker.test_placement import tokens_of

NewClient = Callable[..., Client]
PROMPT = [3, 14, 15]


@contextmanager
def slow_storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let states of runs be written no sooner than the event is set."""
    may_write, store = threading.Event(), snapshots.store

    def store_later(*args: object) -> int:
        assert may_write.wait(DEADLINE_S)
        return store(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(snapshots, "store", store_later)
    yield may_write
    may_write.set()


def trained(client: Client, *, num_steps: int = 3) -> None:
    for number in range(num_steps):
        client.forward_backward(tokens_of(number))
        client.optim_step()


def session_of(save: int, *, deadline_s: float = LONG_S) -> SamplingSession:
    answer = json.loads(bytes(finished(save, deadline_s=deadline_s).result or b""))
    return SamplingSession.objects.get(public_id=answer["sampling_session_id"])


def drawn(session: SamplingSession) -> tuple[list[int], list[float]]:
    """Return greedy tokens of a session's weights with their log-probabilities, which tell the weights."""
    pk = _sample(session, prompt=PROMPT, max_tokens=8, temperature=0.0)
    operation = finished(pk, deadline_s=LONG_S)
    assert operation.state == Operation.State.DONE, operation.error
    (sequence,) = results.decode_sample(bytes(operation.result or b"")).sequences
    assert sequence.logprobs is not None
    return sequence.tokens.tolist(), sequence.logprobs.tolist()


def test_weights_are_sampled_from_before_anything_of_them_is_written(
    start_worker: Callable[[], GpuWorker], new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_worker()
    client = new_client()
    trained(client)
    with slow_storage(monkeypatch) as may_write:
        session = session_of(client.save_ephemeral(0))
        pk = _sample(session, prompt=PROMPT, max_tokens=8, temperature=0.0)
        wait_for(lambda: Operation.objects.get(pk=pk).worker_id, what="the sample is taken")
        checkpoint = Checkpoint.objects.get(run=client.run)
        assert checkpoint.size_bytes == 0
        assert not Path(default_storage.path(checkpoint.directory)).exists()
        run = TrainingRun.objects.get(pk=client.run.pk)
        assert run.applied_seq == checkpoint.seq - 1
        may_write.set()
        assert finished(pk).state == Operation.State.DONE
    wait_for(lambda: Checkpoint.objects.get(run=client.run).size_bytes, what="the file is written")
    assert Path(default_storage.path(checkpoint.directory)).is_dir()
    client.optim_step()
    finished(client.forward_backward(PROMPT))
    assert TrainingRun.objects.get(pk=client.run.pk).applied_seq == client.seq


@pytest.mark.parametrize(
    "goes_on", [False, True], ids=["and its client only samples", "and its client trains on"]
)
def test_a_worker_that_dies_before_the_file_is_written_takes_no_weights_with_it(
    start_process: StartProcess,
    new_client: NewClient,
    goes_on: bool,
) -> None:
    undisturbed, client = new_client(), new_client()
    for one in (undisturbed, client):
        trained(one)
    dying = start_process(MINTWEB_FAILPOINTS="after_answer:kill@2")
    expected = drawn(session_of(undisturbed.save_ephemeral(0)))
    session = session_of(client.save_ephemeral(0))
    assert dying.wait(LONG_S) == -signal.SIGKILL
    owed = Checkpoint.objects.get(run=client.run)
    assert early_answers.is_owed(owed.directory)
    assert not Path(default_storage.path(owed.directory)).exists()

    if goes_on:
        client.forward_backward(PROMPT)
        client.optim_step()
    start_process()
    assert drawn(session) == expected
    written = wait_for(
        lambda: Checkpoint.objects.filter(run=client.run, size_bytes__gt=0).first(),
        what="the file is written",
    )
    assert Path(default_storage.path(written.directory)).is_dir()
    trained(undisturbed, num_steps=1)
    trained(client, num_steps=1)
    if not goes_on:
        looks = [one.forward_backward(PROMPT) for one in (undisturbed, client)]
        losses = [losses_of(finished(look, deadline_s=LONG_S)) for look in looks]
        assert losses[0] == losses[1]
    finished(client.forward_backward(PROMPT), deadline_s=LONG_S)
    assert TrainingRun.objects.get(pk=client.run.pk).state == TrainingRun.State.OPEN
    assert Checkpoint.objects.filter(run=client.run).count() == 1


def test_a_save_that_storage_keeps_refusing_is_given_up_alone(
    start_worker: Callable[[], GpuWorker], new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "_WRITE_AGAIN_S", (0.01,))
    start_worker()
    client = new_client()
    trained(client)
    finished(client.forward_backward(PROMPT))
    in_the_way = Path(default_storage.path("checkpoints")) / str(client.run.pk)
    in_the_way.parent.mkdir(parents=True, exist_ok=True)
    in_the_way.touch()
    session = session_of(client.save_ephemeral(0))
    wait_for(lambda: not Checkpoint.objects.filter(run=client.run).exists(), what="it is given up")
    in_the_way.unlink()
    refused = finished(_sample(session, prompt=PROMPT, max_tokens=2))
    assert refused.state == Operation.State.FAILED
    assert "were deleted" in refused.error
    losses_of(finished(client.forward_backward(PROMPT)))
    assert drawn(session_of(client.save_ephemeral(1)))
    assert not RunEvent.objects.filter(run=client.run, kind__in=["recovered", "diverged"]).exists()
