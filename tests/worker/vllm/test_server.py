"""Samples by a real vLLM server on CPUs: the engine's, whatever else is drawn, and none lost when it fails."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest

from gpuworker.engine import checkpoints
from gpuworker.engine.engine import Engine
from gpuworker.engine.types import LoraSpec, SampleResult
from gpuworker.vllm_adapters import Folders
from gpuworker.vllm_wire import Refusal
from tests.worker.conftest import wait_for
from tests.worker.vllm import cases
from tests.worker.vllm.cases import ADAPTER, MODEL
from tests.worker.vllm.conftest import (
    Connect,
    all_outcomes,
    attached,
    compare,
    outcome_of,
)
from tests.worker.vllm.process import VllmProcess, program

pytestmark = pytest.mark.skipif(
    not program().is_file(), reason="needs an environment with vLLM: make vllm-env"
)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    server = VllmProcess(tmp_path_factory.mktemp("vllm") / "log")
    yield server
    server.kill()


def test_it_draws_as_the_engine(connect: Connect, engine: Engine, process: VllmProcess) -> None:
    sampler = attached(connect(process.url))
    for one in cases.all_of(engine):
        if one.request_id == "too_many":
            assert isinstance(outcome_of(sampler, one), Refusal)
        else:
            compare(sampler, engine, one)


def test_it_streams_and_ends_what_is_cancelled(
    connect: Connect, engine: Engine, process: VllmProcess
) -> None:
    sampler = attached(connect(process.url))
    one = replace(cases.request("long"), params=replace(cases.GREEDY, max_tokens=2000))
    first = cases.draw(engine, replace(one, params=cases.GREEDY)).sequences[0].tokens.tolist()
    sampler.submit(one, is_watched=True)
    shown = wait_for(lambda: sampler.tokens_of("long", start=10), what="some tokens")
    assert shown[:14] == first[10:][: len(shown)]
    assert process.num_running() == 1
    assert sampler.cancel("long")
    wait_for(lambda: process.num_running() == 0, what="the server has ended it")


def test_it_keeps_adapters_apart(
    connect: Connect, engine: Engine, process: VllmProcess, folders: Folders
) -> None:
    """Of each kind, lm_head too, drawn together; one of too high a rank is refused, and so is a base that is none."""
    sampler = attached(connect(process.url))
    specs = {
        "checkpoints/whole": LoraSpec(rank=8, seed=5),
        "checkpoints/head": LoraSpec(rank=4, seed=6, train_attn=False, train_mlp=False),
        "checkpoints/mlp": LoraSpec(rank=16, seed=7, train_attn=False, train_unembed=False),
    }
    root = folders.lend(ADAPTER).parent.parent
    for name, spec in {**specs, "checkpoints/high": LoraSpec(rank=32, seed=8)}.items():
        state = cases.adapter_state(engine, spec)
        checkpoints.write(state, root / name, base_model=MODEL)
        engine.load_sampler(name, state)
    requests = [cases.request(name, adapter=name) for name in (*specs, ADAPTER)]
    for one in requests:
        sampler.submit(one, is_watched=False)
    outcomes = all_outcomes(sampler, len(requests))
    for one in requests:
        outcome = outcomes[one.request_id]
        assert isinstance(outcome, SampleResult), outcome
        cases.assert_same(outcome, cases.draw(engine, one))
    refused = outcome_of(sampler, cases.request("high", adapter="checkpoints/high"))
    assert "rank 32 is greater than max_lora_rank 16" in str(refused)
    # Now that all four places are taken, this build no longer knows the base model, which is noticed.
    base = cases.request("base")
    outcome = outcome_of(sampler, base)
    if isinstance(outcome, SampleResult):
        cases.assert_same(outcome, cases.draw(engine, base))
    else:
        assert "answers with an adapter's weights" in str(outcome)


def test_it_that_freezes_dies_and_comes_back(connect: Connect, engine: Engine, process: VllmProcess) -> None:
    sampler = attached(connect(process.url))
    long = replace(cases.request("long"), params=replace(cases.GREEDY, max_tokens=2000))
    sampler.submit(long, is_watched=True)
    wait_for(lambda: sampler.tokens_of("long", start=0), what="it is being drawn")
    process.signal(signal.SIGSTOP)
    ((_, outcome),) = wait_for(sampler.step, what="it is given up")
    assert "does not answer" in str(outcome)
    process.signal(signal.SIGCONT)
    attached(sampler)
    sampler.submit(long, is_watched=True)
    wait_for(lambda: sampler.tokens_of("long", start=0), what="it is being drawn again")
    process.kill()
    ((_, outcome),) = wait_for(sampler.step, what="it is refused")
    assert isinstance(outcome, Refusal)
    process.start()
    attached(sampler)
    compare(sampler, engine, cases.by_name(engine)["greedy_adapter"])
