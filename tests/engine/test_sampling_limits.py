"""Temperatures near 0 and models that have diverged: a request ends by itself and leaves its neighbours alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import NonFiniteError
from gpuworker.engine.types import LoraSpec, SampleResult, SamplingParams

from .reference import make_adapter
from .sampling_requests import GREEDY, WARM, assert_same, finish, make_request, sample_one

FILTERS = [WARM, replace(WARM, top_p=0.9), replace(WARM, top_k=5), replace(WARM, top_k=5, top_p=0.5)]


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-40, 1e-50, 5e-324])
@pytest.mark.parametrize("params", FILTERS)
def test_a_tiny_temperature_samples_what_zero_does(
    engine: Engine, params: SamplingParams, temperature: float
) -> None:
    expected = sample_one(engine, make_request("cold", params=GREEDY)).sequences[0]
    neighbour = make_request("warm", 8, params=WARM)
    alone = sample_one(engine, neighbour).sequences[0]
    engine.sampler.submit(make_request("cold", params=replace(params, temperature=temperature)))
    engine.sampler.submit(neighbour)
    outcomes = finish(engine.sampler)
    cold, warm = outcomes["cold"], outcomes["warm"]
    assert isinstance(cold, SampleResult)
    assert isinstance(warm, SampleResult)
    assert_same(cold.sequences[0], expected)
    assert_same(warm.sequences[0], alone)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("params", FILTERS)
def test_a_diverged_sampler_fails_alone_at_any_temperature(
    engine: Engine, params: SamplingParams, factor: float
) -> None:
    neighbour = make_request("well", 8, params=WARM)
    alone = sample_one(engine, neighbour).sequences[0]
    state = make_adapter(engine, "sick", LoraSpec(rank=4, seed=46))
    engine.load_sampler("sick", replace(state, weights=state.weights * factor))
    engine.sampler.submit(replace(make_request("sick", sampler_id="sick", params=params), num_samples=2))
    engine.sampler.submit(neighbour)
    outcomes = finish(engine.sampler)
    assert isinstance(outcomes["sick"], NonFiniteError)
    assert isinstance(outcomes["well"], SampleResult)
    assert_same(outcomes["well"].sequences[0], alone)
