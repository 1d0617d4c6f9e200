"""Slots of the cache: who gets them, pools that follow what is in use, and what happens where memory runs out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpuworker.engine import base_model, sampling
from gpuworker.engine.base_model import BaseModel
from gpuworker.engine.exceptions import EngineError, OutOfMemory
from gpuworker.engine.kv_cache import KVCache
from gpuworker.engine.sampling import Sampler
from gpuworker.engine.types import SampleRequest, SampleResult, SamplingParams

from .refusing import Refusing
from .sampling_requests import WARM, assert_same, finish, make_request
from .test_sampling import make_sampler

SHORT, LONG = replace(WARM, max_tokens=5), replace(WARM, max_tokens=50)


@pytest.fixture
def base(model_directory: Callable[[str], Path]) -> BaseModel:
    return base_model.load(model_directory("qwen3"), device="cpu", dtype="float32")


def room(base: BaseModel, num_positions: int) -> int:
    """Return the bytes of so many cached positions."""
    return base.cache_bytes_per_position(torch.float32) * num_positions


def submit(sampler: Sampler, prefix: str, params: Iterable[SamplingParams]) -> list[SampleRequest]:
    requests = [
        make_request(f"{prefix}{number}", 5 + number, params=replace(one, seed=number))
        for number, one in enumerate(params)
    ]
    for request in requests:
        sampler.submit(request)
    return requests


def step_until(sampler: Sampler, condition: Callable[[], bool]) -> dict[str, SampleResult | EngineError]:
    outcomes: dict[str, SampleResult | EngineError] = {}
    for _ in range(200):
        if condition():
            return outcomes
        outcomes.update(sampler.step())
    raise AssertionError("it never came to this")


def num_running(sampler: Sampler) -> int:
    return len(sampler._running)


def assert_as_alone(
    base: BaseModel, requests: Iterable[SampleRequest], outcomes: dict[str, SampleResult | EngineError]
) -> None:
    for request in requests:
        sampler = make_sampler(base)
        sampler.submit(request)
        expected, actual = finish(sampler)[request.request_id], outcomes[request.request_id]
        assert isinstance(expected, SampleResult)
        assert isinstance(actual, SampleResult)
        for ours, theirs in zip(actual.sequences, expected.sequences, strict=True):
            assert_same(ours, theirs)


def test_a_long_request_begins_beside_short_ones_and_short_ones_have_their_room_afterwards(
    base: BaseModel,
) -> None:
    """Room for 8 slots of 64 positions, or for 4 of 128; those that stay are in the last slots."""
    sampler = make_sampler(base, cache_bytes=room(base, 64 * 8))
    requests = submit(sampler, "first", [SHORT] * 5 + [LONG] * 3)
    outcomes = step_until(sampler, lambda: num_running(sampler) == 8)
    wide = make_request("wide", 100, params=replace(WARM, max_tokens=20))
    sampler.submit(wide)
    outcomes |= step_until(sampler, lambda: sampler.tokens_of("wide", start=0) != [])
    assert num_running(sampler) == 4
    outcomes |= step_until(sampler, lambda: "wide" in outcomes or not sampler.tokens_of("wide", start=0))
    assert num_running(sampler) == 3
    requests += submit(sampler, "later", [SHORT] * 5)
    outcomes |= sampler.step()
    assert num_running(sampler) == 8
    assert_as_alone(base, [*requests, wide], outcomes | finish(sampler))


def test_a_long_request_after_a_burst_of_short_ones_keeps_to_the_room(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """The pool of the burst, which a GPU keeps, does not get as long in all of its slots."""
    for path in model_directory("qwen3").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    base = base_model.load(tmp_path, device="cpu", dtype="float32")
    sampler = make_sampler(base, max_slots=32, cache_bytes=room(base, 64 * 64), grouped=True)
    submit(sampler, "burst", [SHORT] * 32)
    assert len(finish(sampler)) == 32
    cache = sampler._cache
    assert (cache.num_slots, cache.num_positions) == (32, 64)
    sampler.submit(make_request("lone", 1000, params=SHORT))
    sampler.step()
    assert (cache.num_slots, cache.num_positions) == (1, 1024)
    assert len(finish(sampler)) == 1


@pytest.mark.parametrize("num_allowed", [0, 1, 3])
def test_who_finds_no_memory_beside_others_waits_and_they_stay_whole(
    base: BaseModel, num_allowed: int
) -> None:
    """Some of the pools of two layers are there when memory runs out."""
    sampler = make_sampler(base)
    requests = submit(sampler, "early", [LONG] * 2)
    outcomes = dict(sampler.step())
    late = make_request("late", 100, params=replace(SHORT, max_tokens=20))
    sampler.submit(late)
    device = Refusing(num_allowed=num_allowed)
    with device:
        for _ in range(5):
            outcomes |= sampler.step()
    assert device.num_refused == 1
    assert num_running(sampler) == 2
    assert_as_alone(base, [*requests, late], outcomes | finish(sampler))


def test_who_finds_no_memory_alone_fails_alone(base: BaseModel) -> None:
    """With a pool left of a request before, as a GPU keeps it."""
    sampler = make_sampler(base, cache_bytes=room(base, 128), grouped=True)
    submit(sampler, "before", [SHORT])
    finish(sampler)
    sampler.submit(make_request("large", 100, params=replace(SHORT, max_tokens=20)))
    after = make_request("after", 9, params=SHORT)
    sampler.submit(after)
    with Refusing(num_allowed=0):
        outcomes = dict(sampler.step())
    assert isinstance(outcomes.pop("large"), OutOfMemory)
    assert outcomes == {}
    assert sampler.num_pending == 1
    (result,) = finish(sampler).values()
    assert isinstance(result, SampleResult)
    assert len(result.sequences[0].tokens) == 5


def test_a_request_for_many_samples_does_not_hold_up_the_others(base: BaseModel) -> None:
    sampler = make_sampler(base, max_slots=4)
    many = replace(make_request("many", 9, params=SHORT), num_samples=23)
    few = [
        replace(make_request(f"few{i}", 6 + i, params=replace(SHORT, seed=i)), num_samples=2)
        for i in range(3)
    ]
    for request in (many, *few):
        sampler.submit(request)
    outcomes: dict[str, SampleResult | EngineError] = {}
    outcomes |= step_until(sampler, lambda: num_running(sampler) == 4)
    while sampler.num_pending:
        outcomes |= sampler.step()
    assert list(outcomes)[-1] == "many"
    assert_as_alone(base, [many, *few], outcomes)


def test_a_cache_copies_to_many_slots_in_as_many_calls_as_to_one() -> None:
    class Counting(TorchDispatchMode):
        num_calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.num_calls += 1
            return func(*args, **(kwargs or {}))

    cache = KVCache(device=torch.device("cpu"), dtype=torch.float32)
    cache.resize(8, 16, kept=[])
    keys, values = cache.pools(0, torch.empty(3, 2, 4))
    keys[2], values[2] = torch.randn(2, 16, 2, 4)
    counts = []
    for targets in ([0], [1, 3, 4, 5, 7]):
        with Counting() as calls:
            cache.copy(2, targets, 10)
        counts.append(calls.num_calls)
        for pool in (keys, values):
            assert all(torch.equal(pool[target, :10], pool[2, :10]) for target in targets)
            assert not pool[targets, 10:].any()
    assert counts[0] == counts[1]


def test_slots_get_shorter_before_they_get_fewer() -> None:
    cache = KVCache(device=torch.device("cpu"), dtype=torch.float32)
    assert cache.size_for(4, 1030, max_positions=8192) == (4, 2048)
    assert cache.size_for(7, 1030, max_positions=8192) == (7, 1088)
    assert cache.size_for(64, 1030, max_positions=8192) == (7, 1088)
    assert cache.size_for(1, 5000, max_positions=100) == (1, 5056)


def test_a_sample_that_the_host_has_no_memory_for_is_refused_before_it_begins(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux gives out memory that it does not have, and ends the process once it is used."""
    sampler = make_sampler(base, cache_bytes=room(base, 64))
    monkeypatch.setattr(sampling, "available_bytes", lambda: room(base, 100))
    with pytest.raises(
        OutOfMemory, match=r"128 positions, of the prompt and max_tokens together, take \d+ MiB"
    ):
        sampler.submit(make_request("long", 90, params=LONG))
    assert sampler.num_pending == 0
    sampler.submit(make_request("short", 40, params=LONG))
    assert isinstance(finish(sampler)["short"], SampleResult)


def test_a_prompt_that_fills_the_context_has_as_many_empty_samples_as_were_asked_for(
    base: BaseModel,
) -> None:
    sampler = make_sampler(base, prompt_budget=base.max_context)
    sampler.submit(replace(make_request("full", base.max_context), num_samples=3))
    result = finish(sampler)["full"]
    assert isinstance(result, SampleResult)
    assert [len(sequence.tokens) for sequence in result.sequences] == [0, 0, 0]


def test_what_requests_want_and_who_is_left_out_is_known(base: BaseModel) -> None:
    sampler = make_sampler(base, max_slots=4, cache_bytes=room(base, 2 * 64))
    assert (sampler.num_wanted, sampler.has_left_out) == (0, False)
    submit(sampler, "early", [SHORT] * 2)
    sampler.submit(replace(make_request("many", params=SHORT), num_samples=3))
    assert (sampler.num_wanted, sampler.has_left_out) == (5, False)
    sampler.step()
    assert (sampler.num_wanted, sampler.has_left_out) == (5, True)
    outcomes = step_until(sampler, lambda: not sampler.has_left_out)
    assert outcomes.keys() == {"early0", "early1"}
    assert sampler.num_wanted == 2  # the third comes behind what others ask for meanwhile
    finish(sampler)
    assert (sampler.num_wanted, sampler.has_left_out) == (0, False)
