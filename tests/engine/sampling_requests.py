"""Making sampling requests and carrying them through, shared by the tests of sampling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import EngineError
from gpuworker.engine.sampling import Sampler
from gpuworker.engine.types import (
    LoraSpec,
    SampledSequence,
    SampleRequest,
    SampleResult,
    SamplingParams,
)

from .conftest import random_tokens
from .reference import make_adapter

GREEDY = SamplingParams(max_tokens=12, seed=0, temperature=0.0, stop_tokens=())
WARM = replace(GREEDY, temperature=1.0, seed=7)


def make_request(
    request_id: str, length: int = 10, *, sampler_id: str | None = None, params: SamplingParams = GREEDY
) -> SampleRequest:
    prompt = random_tokens(np.random.default_rng(length), length)
    return SampleRequest(request_id=request_id, sampler_id=sampler_id, prompt=prompt, params=params)


def finish(sampler: Sampler) -> dict[str, SampleResult | EngineError]:
    outcomes: dict[str, SampleResult | EngineError] = {}
    for _ in range(1000):
        if not sampler.num_pending:
            return outcomes
        outcomes.update(sampler.step())
    raise AssertionError("sampling does not end")


def sample(engine: Engine, requests: Iterable[SampleRequest]) -> dict[str, SampleResult]:
    for request in requests:
        engine.sampler.submit(request)
    outcomes = finish(engine.sampler)
    for outcome in outcomes.values():
        if isinstance(outcome, EngineError):
            raise outcome
    return {key: value for key, value in outcomes.items() if isinstance(value, SampleResult)}


def sample_one(engine: Engine, request: SampleRequest) -> SampleResult:
    return sample(engine, [request])[request.request_id]


def assert_same(actual: SampledSequence, expected: SampledSequence) -> None:
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.logprobs, expected.logprobs)
    assert actual.stop_reason == expected.stop_reason


def mixed_requests(engine: Engine, *, ranks: tuple[int, ...] = (4, 4)) -> list[SampleRequest]:
    """Return requests of different lengths for the bare model and for adapters of the given ranks, in turn."""
    requests = []
    for number in range(2 * (len(ranks) + 1)):
        place = number % (len(ranks) + 1)
        sampler_id = f"mixed-{place}" if place else None
        if sampler_id is not None:
            make_adapter(engine, sampler_id, LoraSpec(rank=ranks[place - 1], seed=place))
            engine.keep_sampler(sampler_id, sampler_id)
        requests.append(make_request(f"mixed-{number}", 5 + 7 * number, sampler_id=sampler_id))
    return requests
