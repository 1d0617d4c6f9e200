"""A worker whose base model is split over two processes: the same numbers, and a kill of either costs seconds only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import pytest
import torch
from django.core.files.storage import default_storage
from django.db import connection
from pytest_django.fixtures import Settings

from gpuworker.engine import checkpoints
from mintweb import programs
from runs.models import Checkpoint, Operation, RunEvent, SamplingSession, Worker
from runs.schemas import requests, results
from runs.schemas.sampling import Sample
from runs.services import operations
from runs.services.operations import Submission
from tests.up.instances import ROOT, all_processes, clean_environment, command, environment
from tests.worker.conftest import MODEL, Client, Start, finished, losses_of

pytestmark = pytest.mark.skipif(
    torch.accelerator.current_accelerator() is not None, reason="this torch splits over its GPUs only"
)
NewClient = Callable[..., Client]
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
# Sums over two processes are rounded elsewhere in float32; five steps of Adam make more of it.
TOLERANCE = 1e-3
RESTART_S = 120.0


@pytest.fixture
def _in_pairs(settings: Settings) -> None:
    settings.TENSOR_PARALLEL = 2


def train(client: Client, *, num_steps: int) -> list[int]:
    """Submit steps and return the numbers of their forward_backwards."""
    numbers = []
    for _ in range(num_steps):
        numbers.append(client.forward_backward(TOKENS))
        client.optim_step()
    return numbers


def saved_weights(client: Client) -> bytes:
    """Return the file of the adapter's weights as they are now."""
    answer = finished(client.save("end"), deadline_s=RESTART_S)
    assert answer.state == Operation.State.DONE, answer.error
    checkpoint = Checkpoint.objects.get(run=client.run, name="end")
    return (Path(default_storage.path(checkpoint.directory)) / checkpoints.ADAPTER_FILE).read_bytes()


def sample(client: Client, *, seq: int) -> list[int]:
    """Save the newest weights for sampling and return what they say greedily."""
    made = finished(client.save_ephemeral(seq))
    assert made.state == Operation.State.DONE, made.error
    session_id = json.loads(bytes(made.result or b""))["sampling_session_id"]
    session = SamplingSession.objects.get(public_id=session_id)
    body = Sample.model_validate(
        {
            "sampling_session_id": session_id,
            "seq_id": 0,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": TOKENS[:4]}]},
            "sampling_params": {"max_tokens": 6, "temperature": 0.0},
        }
    )
    submission = Submission(kind=Operation.Kind.SAMPLE, seq=0, payload=requests.canonical_json(body))
    number = operations.submit_sample(session, submission)
    tokens: list[int] = (
        results.decode_sample(bytes(finished(number).result or b"")).sequences[0].tokens.tolist()
    )
    return tokens


@pytest.mark.usefixtures("_in_pairs")
def test_a_group_trains_and_samples_as_one_process_does(
    start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    shared, alone = new_client(), new_client()
    group = start_worker()
    group_losses = [losses_of(finished(number)) for number in train(shared, num_steps=5)]
    drawn = [sample(shared, seq=seq) for seq in range(2)]
    group.row.refresh_from_db()
    assert group.row.device == "2 devices: cpu"
    assert group.row.fingerprint[MODEL]["num_devices"] == "2"
    group.stop()

    settings.TENSOR_PARALLEL = 1
    start_worker()
    losses = [losses_of(finished(number)) for number in train(alone, num_steps=5)]
    assert drawn == [sample(alone, seq=0)] * 2

    np.testing.assert_allclose(group_losses, losses, rtol=TOLERANCE)
    assert losses[-1] < losses[0] - 1


class SupervisedWorker:
    """The worker's own program, started again whenever it ends, as supervisord does."""

    def __init__(self, env: dict[str, str]) -> None:
        (program,) = programs.gpu_workers()
        self._command = program.command
        self._env = {**env, **program.env}
        self._is_stopping = False
        self.statuses: list[int] = []
        self.first: subprocess.Popen[bytes] = self._start()
        self._thread = threading.Thread(target=self._keep_running)
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping = True
        self.first.send_signal(signal.SIGTERM)
        self._thread.join()

    def followers(self) -> list[int]:
        """Return the processes that hold the other parts, as seen from the system."""
        mark = f"MINTWEB_DATA_DIR={self._env['MINTWEB_DATA_DIR']}".encode()
        found = [pid for pid in all_processes() if b"gpuworker.follower" in command(pid)]
        return [pid for pid in found if mark in environment(pid)]

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, cwd=ROOT, env=self._env)

    def _keep_running(self) -> None:
        while True:
            self.statuses.append(self.first.wait())
            if self._is_stopping:
                return
            self.first = self._start()


@pytest.fixture
def supervised(
    transactional_db: None, base_model: str, model_directory: Path, settings: Settings
) -> Iterator[SupervisedWorker]:
    """A group of two in processes of its own, on the test's database."""
    settings.TENSOR_PARALLEL, settings.BASE_MODELS = 2, {MODEL: str(model_directory)}
    address = urlsplit(os.environ["DATABASE_URL"])
    env = clean_environment(
        MINTWEB_DATA_DIR=os.environ["MINTWEB_DATA_DIR"],
        DATABASE_URL=urlunsplit(address._replace(path=f"/{connection.settings_dict['NAME']}")),
        REDIS_URL=os.environ["REDIS_URL"],
        MINTWEB_BASE_MODELS=f"{MODEL}={model_directory}",
        MINTWEB_TENSOR_PARALLEL="2",
        MINTWEB_DTYPE="float32",
    )
    worker = SupervisedWorker(env)
    yield worker
    worker.stop()


@pytest.mark.timeout(600)
def test_a_killed_follower_costs_no_work(supervised: SupervisedWorker, new_client: NewClient) -> None:
    undisturbed, disturbed = new_client(), new_client()
    train(undisturbed, num_steps=6)
    expected = saved_weights(undisturbed)
    first_half = train(disturbed, num_steps=3)
    finished(first_half[-1])
    (follower,) = supervised.followers()

    os.kill(follower, signal.SIGKILL)
    train(disturbed, num_steps=3)

    assert saved_weights(disturbed) == expected
    assert supervised.statuses == [3]
    assert follower not in supervised.followers()
    events = set(RunEvent.objects.filter(run=disturbed.run).values_list("kind", flat=True))
    assert "diverged" not in events
    assert events & {"recovered", "restored"}
    assert Worker.objects.filter(stopped_at=None).count() == 1
