"""A worker with a vLLM server: who draws its samples, what happens when the server fails, and what people see of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.db import transaction
from pytest_django.fixtures import Settings

from gpuworker import sample_desk, vllm_servers
from gpuworker.worker import GpuWorker
from runs.models import Checkpoint, Operation, SamplingSession, User, Worker
from runs.schemas import requests, results
from runs.schemas.results import SampleOutput
from runs.schemas.sampling import StoredSample
from runs.services import base_models, operations, sampling, sessions, workers
from runs.services.operations import Submission
from tests.up.instances import free_port
from tests.worker.conftest import Client, finished, wait_for
from tests.worker.test_early_answers import slow_storage
from tests.worker.test_streaming import heard
from tests.worker.vllm import cases
from tests.worker.vllm.replay import EXCHANGES, Replay

Start = Callable[[], GpuWorker]
GREEDY = {"max_tokens": 24, "temperature": 0, "seed": 0, "stop": []}

SCORED: dict[str, Any] = {
    "params": {**GREEDY, "max_tokens": 2},
    "prompt_logprobs": True,
    "topk_prompt_logprobs": 5,
}


@pytest.fixture
def base_model(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> str:
    """Offer the shipped model alone, and look at its server often."""
    monkeypatch.setattr(base_models, "_cache", None)
    monkeypatch.setattr(workers, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(vllm_servers, "LOOK_S", 0.05)
    monkeypatch.setattr(vllm_servers, "SILENCE_S", 0.5)
    settings.BASE_MODELS = {cases.MODEL: str(cases.DIRECTORY)}
    settings.DEVICE = "cpu"
    settings.DTYPE = "float32"
    return cases.MODEL


@pytest.fixture
def server(settings: Settings) -> Iterator[Replay]:
    replay = Replay()
    settings.VLLM = {cases.MODEL: replay.url}
    yield replay
    replay.kill()


@pytest.fixture
def start(start_worker: Start, server: Replay) -> Start:
    """Return a function that starts a worker and waits until it knows its server."""

    def begin() -> GpuWorker:
        worker = start_worker()
        wait_for(lambda: "by vLLM" in words_of(worker), what="the server is known")
        return worker

    return begin


def words_of(worker: GpuWorker) -> str:
    return str(Worker.objects.get(pk=worker.row.pk).samplers.get(cases.MODEL, ""))


@pytest.fixture
def session(alice: User, base_model: str) -> SamplingSession:
    return session_of(alice, base_model, None)


def session_of(
    alice: User, base_model: str, checkpoint: Checkpoint | None, *, seq: int = 0
) -> SamplingSession:
    return sampling.create_sampling_session(
        sessions.create_session(alice), seq_id=seq, base_model=base_model, checkpoint=checkpoint
    )


def ask(
    session: SamplingSession,
    *,
    seq: int = 0,
    params: Mapping[str, Any] = GREEDY,
    stream: bool = False,
    **further: Any,
) -> int:
    body = StoredSample.model_validate(
        {
            "sampling_session_id": session.public_id,
            "seq_id": seq,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(cases.PROMPT)}]},
            "sampling_params": params,
            "stream": stream,
            **further,
        }
    )
    payload = requests.canonical_json(body)
    return operations.submit_sample(session, Submission(kind=Operation.Kind.SAMPLE, seq=seq, payload=payload))


def answer(pk: int) -> SampleOutput:
    operation = finished(pk)
    assert operation.state == Operation.State.DONE, operation.error
    return results.decode_sample(bytes(operation.result or b""))


def tokens(output: SampleOutput) -> list[list[int]]:
    return [one.tokens.tolist() for one in output.sequences]


def test_the_server_draws_and_the_answer_is_the_engines(
    start: Start, server: Replay, session: SamplingSession, settings: Settings, start_worker: Start
) -> None:
    worker = start()
    by_server = [answer(ask(session, seq=0)), answer(ask(session, seq=1, **SCORED))]
    assert len(server.completions()) == 2
    worker.stop()
    settings.VLLM = {}
    start_worker()
    by_engine = [answer(ask(session, seq=2)), answer(ask(session, seq=3, **SCORED))]
    assert len(server.completions()) == 2
    for one, other in zip(by_server, by_engine, strict=True):
        assert tokens(one) == tokens(other)
        for sequence, same in zip(one.sequences, other.sequences, strict=True):
            np.testing.assert_allclose(sequence.logprobs, same.logprobs, atol=1e-3)
            assert sequence.stop_reason == same.stop_reason
    assert by_server[1].prompt_logprobs is not None
    assert by_engine[1].prompt_logprobs is not None
    np.testing.assert_allclose(by_server[1].prompt_logprobs, by_engine[1].prompt_logprobs, atol=1e-3)


def test_weights_whose_file_is_being_written_reach_the_server_as_files(
    start: Start,
    server: Replay,
    new_client: Callable[..., Client],
    alice: User,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start()
    with slow_storage(monkeypatch) as may_write:
        session = saved(new_client(rank=8), alice)
        pk = ask(session)
        wait_for(lambda: Operation.objects.get(pk=pk).worker_id, what="the sample is taken")
        may_write.set()
        output = answer(pk)
    (folder,) = server.loaded.values()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        one.name for one in Path(folder).iterdir()
    }
    assert tokens(output) == [captured("greedy_adapter")]
    assert server.completions()[0]["model"] in server.loaded


def test_the_weights_used_longest_ago_are_unloaded(
    start: Start,
    server: Replay,
    new_client: Callable[..., Client],
    alice: User,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sample_desk, "MAX_SAMPLERS", 2)
    start()
    chosen = [saved(new_client(rank=8, model_seq_id=number), alice) for number in range(3)]
    for seq, number in enumerate([0, 1, 0, 2]):
        assert tokens(answer(ask(chosen[number], seq=seq))) == [captured("greedy_adapter")]
    directories = [session.checkpoint.directory for session in chosen if session.checkpoint]
    wait_for(lambda: set(server.loaded) == {directories[0], directories[2]}, what="the second is unloaded")
    assert tokens(answer(ask(chosen[1], seq=4))) == [captured("greedy_adapter")]


def test_an_adapter_that_the_server_does_not_take_is_sampled_by_the_engine(
    start: Start, server: Replay, new_client: Callable[..., Client], alice: User
) -> None:
    worker = start()
    server.refused_adapters = "LoRA rank 8 is greater than max_lora_rank 4."
    session = saved(new_client(rank=8), alice)
    first, second = (tokens(answer(ask(session, seq=seq))) for seq in (0, 1))
    assert first == second
    assert first != [captured("greedy_adapter")]
    assert not server.completions()
    wait_for(lambda: "some by the engine: LoRA rank 8 is greater" in words_of(worker), what="the reason")
    assert tokens(answer(ask(session_of(alice, cases.MODEL, None)))) == [captured("greedy")]
    assert len(server.completions()) == 1


def test_what_the_server_refused_waits_for_its_weights_beside_what_is_tried_alone(
    start: Start,
    server: Replay,
    new_client: Callable[..., Client],
    alice: User,
    session: SamplingSession,
) -> None:
    worker = start()
    own = saved(new_client(), alice)
    worker.stop()
    server.refused_adapters = "LoRA rank 8 is greater than max_lora_rank 4."
    start()  # the engine has to read the weights
    with transaction.atomic():
        refused, suspicious = ask(own), ask(session)
        Operation.objects.filter(pk=suspicious).update(attempts=9)
    assert [len(tokens(answer(pk))[0]) for pk in (refused, suspicious)] == [24, 24]


def test_a_server_killed_over_samples_loses_none_and_is_used_again(
    start: Start, server: Replay, session: SamplingSession, settings: Settings
) -> None:
    worker = start()
    server.may_answer.clear()
    asked = [ask(session, seq=seq, stream=seq == 0) for seq in range(5)]
    for _ in asked:
        assert server.held.acquire(timeout=60)
    assert not Operation.objects.exclude(state=Operation.State.QUEUED).filter(pk__in=asked).exists()
    server.kill()
    for pk in asked:
        assert tokens(answer(pk)) == [captured("greedy")]
    wait_for(lambda: words_of(worker).startswith("samples by the engine: the vLLM server"), what="it is told")
    assert tokens(answer(ask(session, seq=5))) == [captured("greedy")]
    again = Replay(port=server.port)
    try:
        wait_for(lambda: "by vLLM" in words_of(worker), what="it is used again")
        assert tokens(answer(ask(session, seq=6))) == [captured("greedy")]
        assert len(again.completions()) == 1
    finally:
        again.kill()


def test_without_its_server_a_worker_samples_from_the_start(
    start_worker: Start, session: SamplingSession, settings: Settings
) -> None:
    settings.VLLM = {cases.MODEL: f"http://127.0.0.1:{free_port()}"}
    worker = start_worker()
    assert tokens(answer(ask(session))) == [captured("greedy")]
    wait_for(lambda: "does not answer (ConnectError)" in words_of(worker), what="the reason")


def test_training_goes_on_while_the_server_draws(
    start: Start, server: Replay, session: SamplingSession, new_client: Callable[..., Client]
) -> None:
    start()
    server.may_answer.clear()
    asked = ask(session)
    assert server.held.acquire(timeout=60)
    client = new_client()
    client.forward_backward([1, 2, 3, 4, 5])
    assert finished(client.optim_step()).state == Operation.State.DONE
    assert Operation.objects.get(pk=asked).state == Operation.State.QUEUED
    server.may_answer.set()
    assert tokens(answer(asked)) == [captured("greedy")]


def test_a_watched_sample_is_shown_while_the_server_draws(
    start: Start, server: Replay, session: SamplingSession
) -> None:
    start()
    pk, partials = heard(session, lambda: ask(session, stream=True))
    assert partials[-1]["is_last"]
    assert tokens(answer(pk)) == [captured("greedy")]
    assert [body["stream"] for body in server.completions()] == [True]


def test_a_stopped_sample_is_given_up_at_the_server(
    start: Start, server: Replay, session: SamplingSession
) -> None:
    worker = start()
    server.may_answer.clear()
    pk = ask(session, stream=True)
    assert server.held.acquire(timeout=60)
    assert operations.cancel_sample(pk)
    assert finished(pk).error == "stopped"
    wait_for(lambda: not worker.scheduler._desk.is_waiting, what="it is given up")


def test_a_worker_that_ends_leaves_its_samples_to_the_next(
    start: Start, server: Replay, session: SamplingSession
) -> None:
    worker = start()
    server.may_answer.clear()
    pk = ask(session)
    assert server.held.acquire(timeout=60)
    worker.stop()
    start()
    server.may_answer.set()
    assert tokens(answer(pk)) == [captured("greedy")]
    assert Operation.objects.get(pk=pk).attempts == 1


def saved(client: Client, user: User) -> SamplingSession:
    """Train a step and return a session on weights whose file may not be there yet."""
    client.forward_backward([1, 2, 3, 4, 5])
    client.optim_step(learning_rate=0.5)
    finished(client.save_ephemeral(0))
    checkpoint = client.run.checkpoints.get()
    return session_of(user, cases.MODEL, checkpoint)


def captured(name: str) -> list[int]:
    """Return the tokens that the real server gave."""
    answer = json.loads((EXCHANGES / f"{name}.json").read_text())["answer"]
    drawn: list[int] = answer["choices"][0]["token_ids"]
    return drawn
