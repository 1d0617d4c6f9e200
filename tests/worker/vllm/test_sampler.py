"""Samples by a vLLM server: its captured answers are the engine's, and whatever it does not draw is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from gpuworker.engine.engine import Engine
from gpuworker.engine.types import SampleRequest, SampleResult
from gpuworker.vllm_adapters import Folders
from gpuworker.vllm_client import ServedModel
from gpuworker.vllm_sampler import VllmSampler
from gpuworker.vllm_wire import Refusal, StreamedCompletion
from tests.worker.conftest import wait_for
from tests.worker.vllm import cases
from tests.worker.vllm.cases import ADAPTER, MODEL
from tests.worker.vllm.conftest import (
    Connect,
    all_outcomes,
    attached,
    compare,
    drawn,
    outcome_of,
)
from tests.worker.vllm.replay import Replay


@pytest.fixture
def replay() -> Iterator[Replay]:
    server = Replay()
    yield server
    server.kill()


@pytest.fixture
def sampler(connect: Connect, replay: Replay) -> VllmSampler:
    return attached(connect(replay.url))


def test_its_answers_are_the_engines(sampler: VllmSampler, engine: Engine) -> None:
    ours = [one for one in cases.all_of(engine) if one.request_id != "too_many"]
    assert len(ours) > 10
    for one in ours:
        compare(sampler, engine, one)
    assert sampler.words.startswith("samples by vLLM 0.32.0 at 127.0.0.1:")
    assert "engine" not in sampler.words


def test_drawn_samples_differ(sampler: VllmSampler, engine: Engine) -> None:
    sequences = drawn(sampler, cases.by_name(engine)["warm"]).sequences
    assert len({tuple(one.tokens.tolist()) for one in sequences}) == 3


@pytest.mark.parametrize("name", ["greedy", "greedy_adapter"])
def test_a_watched_sample_is_streamed(
    sampler: VllmSampler, engine: Engine, replay: Replay, name: str
) -> None:
    one = cases.by_name(engine)[name]
    cases.assert_same(drawn(sampler, one, is_watched=True), cases.draw(engine, one))
    assert replay.completions()[-1]["stream"]
    assert sampler.tokens_of(one.request_id, start=0) == []


def test_a_stream_that_fails_or_ends_early_is_refused() -> None:
    stream = StreamedCompletion()
    with pytest.raises(Refusal, match="the engine core is dead"):
        stream.take('data: {"error": {"message": "the engine core is dead", "code": 500}}')
    piece = {"token_ids": [5], "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": None}
    stream.take(f"data: {json.dumps({'choices': [piece]})}")
    assert stream.tokens == [5]
    with pytest.raises(Refusal, match="an answer that cannot be read"):
        stream.result(cases.request("x"), max_new=24, end_tokens=())
    short = StreamedCompletion()
    short.take(f"data: {json.dumps({'choices': [{**piece, 'finish_reason': 'length'}]})}")
    with pytest.raises(Refusal, match="1 tokens in the place of 24: the server has a limit of its own"):
        short.result(cases.request("x"), max_new=24, end_tokens=())


def test_what_it_answers_with_an_error_is_refused(
    sampler: VllmSampler, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    one = cases.by_name(engine)["too_many"]
    for _ in range(2):
        outcome = outcome_of(sampler, one)
        assert isinstance(outcome, Refusal)
        assert "greater than max allowed: 20" in str(outcome)
    assert "some by the engine: Requested prompt logprobs of 60" in sampler.words
    assert caplog.text.count("greater than max allowed") == 1
    cases.assert_same(drawn(sampler, cases.request("next")), cases.draw(engine, cases.request("x")))


def test_it_is_not_asked_for_what_it_does_otherwise(sampler: VllmSampler) -> None:
    greedy = cases.GREEDY
    assert sampler.accepts(cases.request("a"))
    assert not sampler.accepts(cases.request("b", replace(greedy, temperature=0.001)))
    assert not sampler.accepts(cases.request("c", replace(greedy, max_tokens=0)))
    assert not sampler.accepts(cases.request("d", prompt=(1,) * 2048))


def test_an_adapter_is_loaded_once_and_unloaded(sampler: VllmSampler, engine: Engine, replay: Replay) -> None:
    one = cases.by_name(engine)["greedy_adapter"]
    for _ in range(2):
        drawn(sampler, one)
    assert [path for path, _ in replay.requests].count("/v1/load_lora_adapter") == 1
    assert list(replay.loaded) == [ADAPTER]
    sampler.drop(ADAPTER)
    wait_for(lambda: not replay.loaded, what="the adapter is unloaded")
    drawn(sampler, one)
    assert list(replay.loaded) == [ADAPTER]


def test_an_adapter_stays_while_a_sample_needs_it(
    sampler: VllmSampler, engine: Engine, replay: Replay
) -> None:
    one = cases.by_name(engine)["greedy_adapter"]
    replay.may_answer.clear()
    sampler.submit(one, is_watched=False)
    assert replay.held.acquire(timeout=30)
    sampler.drop(ADAPTER)
    # Calls of the loop's thread come in order: the next adapter is asked for after the drop was seen.
    other = cases.request("other", adapter="checkpoints/none")
    assert isinstance(outcome_of_other(sampler, other), Refusal)
    assert list(replay.loaded) == [ADAPTER]
    replay.may_answer.set()
    ((_, outcome),) = wait_for(sampler.step, what="the sample")
    assert isinstance(outcome, SampleResult)
    wait_for(lambda: not replay.loaded, what="the adapter is unloaded")


def outcome_of_other(sampler: VllmSampler, one: SampleRequest) -> SampleResult | Refusal:
    """Draw one beside a sample that is held back."""
    sampler.submit(one, is_watched=False)
    return all_outcomes(sampler, 1)[one.request_id]


def test_an_adapter_that_is_refused_is_tried_once(
    sampler: VllmSampler, engine: Engine, replay: Replay, given_back: list[str]
) -> None:
    given_back.clear()
    replay.refused_adapters = "LoRA rank 64 is greater than max_lora_rank 16."
    one = cases.by_name(engine)["greedy_adapter"]
    outcome = outcome_of(sampler, one)
    assert isinstance(outcome, Refusal)
    assert "rank 64 is greater than max_lora_rank 16" in str(outcome)
    assert not sampler.accepts(one)
    assert sampler.accepts(cases.request("base"))
    assert "max_lora_rank 16" in sampler.words
    assert given_back == [ADAPTER]


def test_an_adapter_that_the_server_has_lost_is_loaded_again(
    sampler: VllmSampler, engine: Engine, replay: Replay
) -> None:
    one = cases.by_name(engine)["greedy_adapter"]
    drawn(sampler, one)
    replay.loaded.clear()
    assert isinstance(outcome_of(sampler, one), Refusal)
    drawn(sampler, one)


def test_the_files_of_an_adapter_that_the_server_has_lost_are_given_back(
    sampler: VllmSampler, engine: Engine, replay: Replay, given_back: list[str]
) -> None:
    one = cases.by_name(engine)["greedy_adapter"]
    drawn(sampler, one)
    given_back.clear()
    replay.loaded.clear()
    assert isinstance(outcome_of(sampler, one), Refusal)
    wait_for(lambda: given_back == [ADAPTER], what="they are given back")
    drawn(sampler, one)
    assert [path for path, _ in replay.requests].count("/v1/unload_lora_adapter") == 0


def test_the_files_of_all_adapters_of_a_server_that_has_become_another_are_given_back(
    sampler: VllmSampler, engine: Engine, replay: Replay, given_back: list[str]
) -> None:
    drawn(sampler, cases.by_name(engine)["greedy_adapter"])
    given_back.clear()
    replay.serve("other/model")
    assert isinstance(outcome_of(sampler, cases.request("base")), Refusal)
    wait_for(lambda: given_back == [ADAPTER], what="they are given back")


def test_an_adapter_that_another_worker_has_loaded_is_used(
    sampler: VllmSampler, engine: Engine, replay: Replay
) -> None:
    replay.loaded[ADAPTER] = "there"
    drawn(sampler, cases.by_name(engine)["greedy_adapter"])


def test_a_server_that_dies_refuses_what_is_open_and_is_used_again(
    connect: Connect, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    server = Replay()
    sampler = attached(connect(server.url))
    server.may_answer.clear()
    for number in range(3):
        sampler.submit(replace(cases.request("x"), request_id=f"x{number}"), is_watched=number == 0)
        assert server.held.acquire(timeout=30)
    server.kill()
    outcomes = all_outcomes(sampler, 3)
    assert all("does not answer" in str(outcome) for outcome in outcomes.values())
    assert not sampler.accepts(cases.request("base"))
    assert sampler.words.startswith("samples by the engine: the vLLM server at 127.0.0.1:")
    assert caplog.text.count("samples by the engine") <= 3
    again = Replay(port=server.port)
    try:
        attached(sampler)
        drawn(sampler, cases.by_name(engine)["greedy_adapter"])
    finally:
        again.kill()


def test_a_server_that_hangs_is_given_up(sampler: VllmSampler, replay: Replay) -> None:
    replay.may_answer.clear()
    sampler.submit(cases.request("x"), is_watched=False)
    assert replay.held.acquire(timeout=30)
    replay.is_frozen.set()
    ((_, outcome),) = wait_for(sampler.step, what="it is given up")
    assert "does not answer (ReadTimeout)" in str(outcome)
    replay.is_frozen.clear()
    replay.may_answer.set()
    attached(sampler)


def test_a_slow_server_is_waited_for(sampler: VllmSampler, engine: Engine, replay: Replay) -> None:
    replay.may_answer.clear()
    one = cases.request("x")
    sampler.submit(one, is_watched=False)
    assert replay.held.acquire(timeout=30)
    looks = replay.num_looks
    wait_for(lambda: replay.num_looks > looks + 20, what="it was looked at for longer than it may be silent")
    assert sampler.num_pending == 1
    replay.may_answer.set()
    ((_, outcome),) = wait_for(sampler.step, what="the sample")
    assert isinstance(outcome, SampleResult)


def test_another_model_is_not_used(connect: Connect) -> None:
    server = Replay(model="other/model")
    try:
        sampler = connect(server.url)
        wait_for(lambda: "serves" in sampler.words, what="it was looked at")
        assert "serves 'other/model', not 'mintweb/tiny'; see its --served-model-name" in sampler.words
        assert not sampler.accepts(cases.request("base"))
    finally:
        server.kill()


def test_a_server_that_has_become_another_is_not_used(sampler: VllmSampler, replay: Replay) -> None:
    replay.serve("other/model")
    outcome = outcome_of(sampler, cases.request("base"))
    assert "The model `mintweb/tiny` does not exist" in str(outcome)
    wait_for(lambda: "serves 'other/model'" in sampler.words, what="it was looked at")
    replay.serve(MODEL)
    attached(sampler)


def test_other_weights_are_not_used(model: ServedModel, folders: Folders, replay: Replay) -> None:
    other = replace(model, probe_logprobs=model.probe_logprobs - np.float32(2))
    sampler = VllmSampler(
        replay.url, other, folders, on_ended=lambda: None, api_key="", look_s=0.05, silence_s=0.3
    )
    try:
        wait_for(lambda: "weights" in sampler.words, what="it was looked at")
        assert "2.00 away from the engine's: it has other weights" in sampler.words
    finally:
        sampler.stop()


def test_an_address_of_something_else_is_told(connect: Connect, replay: Replay) -> None:
    replay.facts["/v1/models"] = {"hello": "world"}
    sampler = connect(replay.url)
    wait_for(lambda: "does not answer as vLLM does" in sampler.words, what="it was looked at")


@pytest.mark.parametrize("models", [["nothing"], {"data": ["nothing"]}, {"data": None}])
def test_an_answer_of_another_form_is_told_and_looked_at_again(
    connect: Connect, replay: Replay, models: object
) -> None:
    real, replay.facts["/v1/models"] = replay.facts["/v1/models"], models
    sampler = connect(replay.url)
    wait_for(lambda: "does not answer as vLLM does" in sampler.words, what="it was looked at")
    replay.facts["/v1/models"] = real
    attached(sampler)


def test_an_answer_that_cannot_be_decoded_is_told_once_and_looked_at_again(
    connect: Connect, replay: Replay, caplog: pytest.LogCaptureFixture
) -> None:
    replay.said_encoding = "gzip"
    sampler = connect(replay.url)
    wait_for(lambda: "gives no whole answer (DecodingError)" in sampler.words, what="it was looked at")
    replay.said_encoding = ""
    attached(sampler)
    assert sum("DecodingError" in record.getMessage() for record in caplog.records) == 1


def test_base_samples_with_an_adapters_weights_are_refused(
    sampler: VllmSampler, engine: Engine, replay: Replay
) -> None:
    """What vLLM 0.32.0 for CPUs does once its last place for adapters is taken."""
    base = cases.request("base")
    drawn(sampler, base)
    adapter = cases.by_name(engine)["greedy_adapter"]
    replay.has_mixed_up_base = True
    drawn(sampler, adapter)
    outcome = outcome_of(sampler, base)
    assert isinstance(outcome, Refusal)
    assert "answers with an adapter's weights" in str(outcome)
    assert not sampler.accepts(base)
    assert sampler.accepts(adapter)


def test_a_cancelled_sample_is_forgotten(sampler: VllmSampler, replay: Replay) -> None:
    replay.may_answer.clear()
    sampler.submit(cases.request("x"), is_watched=True)
    assert replay.held.acquire(timeout=30)
    assert sampler.cancel("x")
    assert not sampler.cancel("x")
    assert sampler.num_pending == 0
    replay.may_answer.set()
    drawn(sampler, cases.request("y"))
