"""Base models that have to be downloaded: what is here is served meanwhile, and they are served once they are here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from django.test import Client as Browser
from huggingface_hub.errors import HfHubHTTPError
from pytest_django.fixtures import Settings

from gpuworker.engine.engine import Engine
from gpuworker.worker import GpuWorker
from runs.models import BaseModel, Operation, SamplingSession, Snapshot, TrainingRun, User, Worker
from runs.services import base_models, operations, placement, sessions, training_runs, waiting
from runs.services.training_runs import Lora
from runs.threads import database_thread
from tests.services.hand_worker import HandWorker
from tests.worker.conftest import LONG_S, Client, Start, drawing_no_end, finished, wait_for
from tests.worker.test_streaming import ask

LATER = "hub/later"
TOKENS = [3, 14, 15, 92, 65]
STOP_S = 20.0


class Hub:
    """The hub: it answers once it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self.may_answer = threading.Event()

    def snapshot_download(self, name: str, **_: object) -> str:
        assert name == LATER
        self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return str(self.folder)


@pytest.fixture
def hub(
    base_model: str, settings: Settings, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """Offer a second base model, which the hub has."""
    settings.BASE_MODELS = {LATER: LATER, **settings.BASE_MODELS}
    hub = Hub(model_directory)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    yield hub
    hub.may_answer.set()


@pytest.fixture
def later(alice: User, hub: Hub) -> Client:
    """Return a client with a run on the base model that comes later."""
    run, _ = training_runs.create_run(
        sessions.create_session(alice), model_seq_id=0, base_model=LATER, lora=Lora(rank=4, seed=1)
    )
    return Client(run)


def readiness() -> tuple[int, dict[str, str]]:
    reply = Browser().get("/health/ready")
    return reply.status_code, reply.json()["base_models"]


def test_what_is_here_is_served_while_another_is_downloaded(
    hub: Hub, later: Client, new_client: Callable[..., Client], start_worker: Start, base_model: str
) -> None:
    wanted = later.forward_backward(TOKENS)
    worker = start_worker()

    client = new_client()
    first = finished(client.forward_backward(TOKENS))
    assert readiness() == (HTTPStatus.OK, {base_model: "loaded", LATER: "loading"})
    reason = f"the worker is still loading {LATER!r}; the operation is safe and starts once it is loaded"
    assert waiting.reason_of(Operation.objects.get(pk=wanted)) == reason

    hub.may_answer.set()

    assert finished(wanted).result == first.result  # the same weights, seed and tokens
    assert finished(client.optim_step()).state == Operation.State.DONE
    assert waiting.reason_of(Operation.objects.get(pk=later.optim_step())) == ""
    wait_for(lambda: readiness()[1] == {base_model: "loaded", LATER: "loaded"}, what="it is announced")
    assert Worker.objects.get(pk=worker.row.pk).fingerprint.keys() == {base_model, LATER}


@pytest.mark.parametrize("kind", [OSError, RuntimeError, HfHubHTTPError.__mro__[1]])
def test_a_download_that_fails_is_reported_and_nothing_else_suffers(
    hub: Hub, later: Client, new_client: Callable[..., Client], start_worker: Start, kind: type[Exception]
) -> None:
    wanted = later.forward_backward(TOKENS)
    start_worker()
    hub.error = kind("the hub is away")
    hub.may_answer.set()

    wait_for(lambda: BaseModel.objects.filter(name=LATER).exclude(error="").exists(), what="the report")

    base_models._cache = None
    reason = waiting.reason_of(Operation.objects.get(pk=wanted))
    assert reason.startswith(f"no worker has the base model {LATER!r}: ")
    assert "could not be downloaded: the hub is away" in reason
    assert finished(new_client().forward_backward(TOKENS)).state == Operation.State.DONE


def test_a_worker_that_takes_no_work_yet_makes_nothing_ready_and_has_no_share(
    new_client: Callable[..., Client], base_model: str
) -> None:
    operation = Operation.objects.get(run=new_client().run)
    worker, other = GpuWorker(), HandWorker()

    def seen() -> tuple[int, bool, str]:
        has_company = placement.look(other.row, [base_model]).has_company
        return readiness()[0], has_company, waiting.reason_of(operation)

    before = seen()
    worker.start()
    try:
        reason = (
            f"the worker is still loading {base_model!r}; the operation is safe and starts once it is loaded"
        )
        assert before == (HTTPStatus.SERVICE_UNAVAILABLE, False, reason)
        assert seen() == (HTTPStatus.OK, True, "")
    finally:
        worker.stop()


@contextmanager
def drawing(worker: GpuWorker, session: SamplingSession) -> Iterator[int]:
    """Have a worker draw a sample for as long as this takes."""
    with drawing_no_end(worker):
        sample = ask(session, num_tokens=200, stream=False)
        wait_for(lambda: Operation.objects.get(pk=sample).worker_id, what="the sample is being drawn")
        yield sample


def test_nothing_is_computed_while_another_has_the_engines(
    start_worker: Start,
    session: SamplingSession,
    new_client: Callable[..., Client],
) -> None:
    worker, client = start_worker(), new_client()
    finished(client.forward_backward(TOKENS))
    with drawing(worker, session) as sample:
        with worker.scheduler.paused():
            waits = client.forward_backward(TOKENS)
            wait_for(worker.scheduler._has_heads, what="it could be computed")
            worker.drain_slice()  # as Celery does
            assert Operation.objects.get(pk=waits).state == Operation.State.QUEUED
        assert finished(waits).state == Operation.State.DONE
        operations.cancel_sample(sample)


def test_a_worker_may_stop_while_it_downloads(hub: Hub, start_worker: Start, base_model: str) -> None:
    worker = start_worker()
    worker.stop()
    hub.may_answer.set()
    wait_for(lambda: not worker._loading.is_alive(), what="the loading ends")
    assert not BaseModel.objects.filter(name=LATER).exists()


@contextmanager
def loading_slowly(hub: Hub) -> Iterator[None]:
    """Have the base model that comes later be loaded for as long as this takes."""
    load, is_loading, may_load = Engine.load, threading.Event(), threading.Event()

    def load_later(directory: Path, **kwargs: Any) -> Engine:
        is_loading.set()
        may_load.wait()
        return load(directory, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "load", load_later)
        hub.may_answer.set()
        assert is_loading.wait(LONG_S)
        try:
            yield
        finally:
            may_load.set()


def test_a_worker_that_stops_while_it_loads_sets_everything_free(
    hub: Hub,
    start_worker: Start,
    new_client: Callable[..., Client],
    session: SamplingSession,
    base_model: str,
) -> None:
    worker, client = start_worker(), new_client()
    finished(client.forward_backward(TOKENS))
    with drawing(worker, session) as sample, loading_slowly(hub):
        waits = client.optim_step()
        wait_for(lambda: Operation.objects.get(pk=waits).worker_id, what="the operation is taken")
        stopping = database_thread("stopping", worker.stop)
        stopping.start()
        stopping.join(STOP_S)
        has_stopped = not stopping.is_alive()
        run = TrainingRun.objects.get(pk=client.run.pk)
        takers = [Operation.objects.get(pk=pk).worker_id for pk in (sample, waits)]
        assert has_stopped
        assert {run.worker_id, *takers} == {None}
        assert Snapshot.objects.get(run=run).seq == run.applied_seq
        assert Worker.objects.get(pk=worker.row.pk).stopped_at is not None
    wait_for(lambda: not worker._loading.is_alive(), what="the loading ends")
    assert worker.scheduler._engines.keys() == Worker.objects.get(pk=worker.row.pk).fingerprint.keys()
    assert worker.scheduler._engines.keys() == {base_model}
    start_worker()
    assert finished(waits).state == Operation.State.DONE


def test_runs_are_kept_when_another_has_the_engines_and_go_on_later(
    start_worker: Start, new_client: Callable[..., Client]
) -> None:
    worker, client = start_worker(), new_client()
    finished(client.forward_backward(TOKENS))
    with worker.scheduler.paused():
        kept = Snapshot.objects.filter(run=client.run)
        wait_for(kept.exists, what="the state is kept")
    assert finished(client.optim_step()).state == Operation.State.DONE
    worker.stop()
    run = TrainingRun.objects.get(pk=client.run.pk)
    assert kept.filter(seq=run.applied_seq).exists()
