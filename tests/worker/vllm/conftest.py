"""A vLLM sampler beside the engine, for the tests against captured answers and those against a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gpuworker.engine import checkpoints
from gpuworker.engine.engine import Engine
from gpuworker.engine.types import SampleRequest, SampleResult
from gpuworker.vllm_adapters import Folders
from gpuworker.vllm_client import ServedModel, served_model
from gpuworker.vllm_sampler import VllmSampler
from gpuworker.vllm_wire import Refusal
from tests.worker.conftest import wait_for
from tests.worker.vllm import cases
from tests.worker.vllm.cases import ADAPTER, MODEL

Connect = Callable[[str], VllmSampler]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = cases.load_engine()
    loaded.load_sampler(ADAPTER, cases.adapter_state(loaded))
    yield loaded
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(engine: Engine) -> ServedModel:
    return served_model(MODEL, "", engine)


@pytest.fixture(scope="module")
def given_back() -> list[str]:
    """Return the adapters whose folders were given back."""
    return []


@pytest.fixture(scope="module")
def folders(engine: Engine, given_back: list[str], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("adapters")
    checkpoints.write(cases.adapter_state(engine), root / ADAPTER, base_model=MODEL)

    def lend(sampler_id: str) -> Path:
        if not (root / sampler_id).is_dir():
            raise OSError("no such adapter")
        return root / sampler_id

    return Folders(lend=lend, take_back=given_back.append)


@pytest.fixture
def connect(model: ServedModel, folders: Folders) -> Iterator[Connect]:
    started: list[VllmSampler] = []

    def make(url: str) -> VllmSampler:
        sampler = VllmSampler(
            url, model, folders, on_ended=lambda: None, api_key="", look_s=0.05, silence_s=0.3
        )
        started.append(sampler)
        return sampler

    yield make
    for sampler in started:
        sampler.stop()


def attached(sampler: VllmSampler) -> VllmSampler:
    wait_for(lambda: "by vLLM" in sampler.words, what=f"attached, not {sampler.words!r}")
    return sampler


def outcome_of(
    sampler: VllmSampler, one: SampleRequest, *, is_watched: bool = False
) -> SampleResult | Refusal:
    sampler.submit(one, is_watched=is_watched)
    outcome = all_outcomes(sampler, 1)[one.request_id]
    assert sampler.num_pending == 0
    return outcome


def all_outcomes(sampler: VllmSampler, number: int) -> dict[str, SampleResult | Refusal]:
    """Return the outcomes of what was submitted, once there are so many."""
    outcomes: dict[str, SampleResult | Refusal] = {}

    def is_complete() -> bool:
        outcomes.update(sampler.step())
        return len(outcomes) == number

    wait_for(is_complete, what=f"the end of {number} samples")
    return outcomes


def drawn(sampler: VllmSampler, one: SampleRequest, *, is_watched: bool = False) -> SampleResult:
    outcome = outcome_of(sampler, one, is_watched=is_watched)
    assert isinstance(outcome, SampleResult), outcome
    return outcome


def compare(sampler: VllmSampler, engine: Engine, one: SampleRequest) -> None:
    """Draw with both: greedy samples are the same, and each has the log-probabilities of the unscaled model."""
    result = drawn(sampler, one)
    if one.params.temperature == 0:
        cases.assert_same(result, cases.draw(engine, one))
    for sequence, scores in zip(result.sequences, cases.score(engine, one, result), strict=True):
        np.testing.assert_allclose(sequence.logprobs, scores, atol=1e-3, rtol=0)
    assert len(result.sequences) == one.num_samples
