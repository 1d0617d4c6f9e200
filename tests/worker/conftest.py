"""A real GPU worker in this process, on a small random model, and a client's way to feed it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from django.db import connection
from pytest_django.fixtures import Settings
from transformers import Qwen3Config, Qwen3ForCausalLM

from gpuworker.worker import GpuWorker
from runs.models import Operation, SamplingSession, TrainingRun, User, Worker
from runs.schemas import forward_backward, requests, results
from runs.schemas.data import DatumArrays
from runs.schemas.forward_backward import ForwardBackwardPayload
from runs.services import accounts, base_models, blobs, loads, operations, sampling, sessions, training_runs
from runs.services.operations import Submission
from runs.services.training_runs import Lora

MODEL = "test/random"
DEADLINE_S = 180.0
FEW_TOKENS = 100
LONG_S = 120.0
ROOT = Path(__file__).parents[2]
Start = Callable[[], GpuWorker]
StartProcess = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small random Qwen3 model."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def base_model(settings: Settings, model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Offer the random model alone."""
    monkeypatch.setattr(base_models, "_cache", None)  # what tests before this one have seen
    settings.BASE_MODELS = {MODEL: str(model_directory)}
    settings.DEVICE = "cpu"
    settings.DTYPE = "float32"
    return MODEL


@pytest.fixture
def start_worker(transactional_db: None, base_model: str) -> Iterator[Start]:
    """Return a function that starts a worker; all are stopped at the end."""
    started: list[GpuWorker] = []

    def start() -> GpuWorker:
        worker = GpuWorker()
        worker.start()
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.stop()


@pytest.fixture
def start_process(
    transactional_db: None, base_model: str, model_directory: Path, settings: Settings, tmp_path: Path
) -> Iterator[StartProcess]:
    """Return a function that starts a worker process on the test's database, with further settings; what still runs is killed at the end."""
    Worker.objects.all().delete()
    parameters = connection.get_connection_params()
    address = f"host={parameters['host']}&port={parameters.get('port', 5432)}"
    env = {
        **os.environ,
        "DATABASE_URL": f"postgres://{parameters['user']}@/{parameters['dbname']}?{address}",
        "MINTWEB_BASE_MODELS": f"{MODEL}={model_directory}",
        "MINTWEB_DATA_DIR": str(settings.DATA_DIR),
        "MINTWEB_DEVICE": "cpu",
        "MINTWEB_DTYPE": "float32",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "celery", "--app", "mintweb", "--skip-checks", "worker", "--pool=solo"]
    command += ["--concurrency=1", "--queues=gpu", "--include=gpuworker.tasks", "--without-mingle"]
    started: list[subprocess.Popen[bytes]] = []

    def start(**extra: str) -> subprocess.Popen[bytes]:
        log = (tmp_path / f"worker{len(started)}.log").open("wb")
        hostname = f"--hostname=gpu{len(started)}@%h"
        process = subprocess.Popen([*command, hostname], cwd=ROOT, env=env | extra, stdout=log, stderr=log)
        log.close()
        started.append(process)
        wait_for(
            lambda: Worker.objects.filter(
                pid=process.pid, stopped_at=None, fingerprint__has_key=MODEL
            ).exists(),
            what="the worker serves the base model",
            deadline_s=LONG_S,
        )
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def alice(transactional_db: None) -> User:
    """Return a user."""
    return User.objects.create(username="alice")


@pytest.fixture
def session(alice: User, base_model: str) -> SamplingSession:
    """Return a sampling session on the bare base model."""
    return sampling.create_sampling_session(
        sessions.create_session(alice), seq_id=0, base_model=base_model, checkpoint=None
    )


@dataclass
class Client:
    """Submits operations of one run as an SDK client would, and reads their answers."""

    run: TrainingRun
    seq: int = 0

    def next_seq(self) -> int:
        """Reserve the next seq_id."""
        self.seq += 1
        return self.seq

    def forward_backward(
        self,
        tokens: Sequence[int],
        *,
        seq: int | None = None,
        weight: float = 1.0,
        forward_only: bool = False,
    ) -> int:
        """Submit one datum whose targets are the next tokens; returns the operation's number."""
        array = np.array(tokens, dtype=np.int64)
        datum = DatumArrays(
            tokens=array[:-1],
            target_tokens=array[1:],
            inputs={"weights": np.full(len(array) - 1, weight, dtype=np.float32)},
        )
        payload = ForwardBackwardPayload(
            model_id=self.run.public_id,
            seq_id=self.next_seq() if seq is None else seq,
            data=(datum,),
            loss_fn="cross_entropy",
            loss_config={},
            forward_only=forward_only,
        )
        kind = Operation.Kind.FORWARD if forward_only else Operation.Kind.FORWARD_BACKWARD
        return self._submit(kind, payload.seq_id, forward_backward.to_bytes(payload), payload.num_tokens)

    def optim_step(self, *, learning_rate: float = 1e-2, seq: int | None = None) -> int:
        """Submit an optimizer step."""
        number = self.next_seq() if seq is None else seq
        body = {
            "model_id": self.run.public_id,
            "seq_id": number,
            "adam_params": {"learning_rate": learning_rate},
        }
        request = requests.OptimStep.model_validate(body)
        return self._submit(Operation.Kind.OPTIM_STEP, number, requests.canonical_json(request))

    def save(self, name: str, *, overwrite: bool = False) -> int:
        """Submit save_weights."""
        number = self.next_seq()
        body = {"model_id": self.run.public_id, "seq_id": number, "path": name, "overwrite": overwrite}
        request = requests.SaveWeights.model_validate(body)
        return self._submit(Operation.Kind.SAVE_WEIGHTS, number, requests.canonical_json(request))

    def save_ephemeral(self, sampling_seq: int) -> int:
        """Submit save_weights_for_sampler for one sampling session."""
        number = self.next_seq()
        body = {"model_id": self.run.public_id, "seq_id": number, "sampling_session_seq_id": sampling_seq}
        request = requests.SaveWeightsForSampler.model_validate(body)
        return self._submit(Operation.Kind.SAVE_WEIGHTS_FOR_SAMPLER, number, requests.canonical_json(request))

    def load(self, directory: str, path: str, *, optimizer: bool) -> int:
        """Submit load_weights."""
        load = loads.submission(
            Operation.Kind.LOAD_WEIGHTS,
            seq=self.next_seq(),
            path=path,
            with_optimizer=optimizer,
            directory=directory,
        )
        return operations.submit(self.run, load)

    def record(self, step: int, metrics: Mapping[str, float]) -> int:
        """Submit values measured elsewhere as metrics of a step."""
        body = json.dumps({"step": step, "metrics": metrics}).encode()
        return self._submit(Operation.Kind.RECORD_METRICS, self.next_seq(), body)

    def _submit(self, kind: str, seq: int, payload: bytes, num_tokens: int = 0) -> int:
        return operations.submit(
            self.run, Submission(kind=kind, seq=seq, payload=payload, num_tokens=num_tokens)
        )


@pytest.fixture
def new_client(alice: User, base_model: str) -> Callable[..., Client]:
    """Return a function that makes a run."""

    def make(*, seed: int = 1, rank: int = 4, model_seq_id: int = 0) -> Client:
        session = sessions.create_session(alice)
        run, _ = training_runs.create_run(
            session, model_seq_id=model_seq_id, base_model=base_model, lora=Lora(rank=rank, seed=seed)
        )
        blobs.delete_folder(
            f"checkpoints/{run.pk}"
        )  # of a run of that number in another database of these tests
        return Client(run)

    return make


def finished(operation_pk: int, *, deadline_s: float = DEADLINE_S) -> Operation:
    """Return the operation once it has its answer."""
    operation: Operation = wait_for(
        lambda: Operation.objects.filter(pk=operation_pk).exclude(state=Operation.State.QUEUED).first(),
        what=f"operation {operation_pk}",
        deadline_s=deadline_s,
    )
    return operation


def wait_for(condition: Callable[[], Any], *, what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Return the condition's first true value."""
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come about within {deadline_s} s")


@contextmanager
def drawing_no_end(worker: GpuWorker) -> Iterator[None]:
    """Let a worker draw some tokens of its samples and then only look after them, so that no longer one ends by itself."""
    desk = worker.scheduler._desk
    step, left = desk.step, iter(range(FEW_TOKENS))

    def step_or_tend() -> None:
        if next(left, None) is not None:
            step()
        else:
            time.sleep(0.01)
            desk.tend()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(desk, "step", step_or_tend)
        yield


def losses_of(operation: Operation) -> float:
    """Return the summed loss of a finished forward_backward."""
    assert operation.state == Operation.State.DONE, operation.error
    _, metrics = results.decode_forward_backward(bytes(operation.result or b""))
    return metrics["loss:sum"]


@pytest.fixture
def admin(transactional_db: None) -> User:
    """Return the first user."""
    return accounts.ensure_admin()
