from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpuworker.engine import base_model
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import AdapterNotLoaded, EngineError, SamplingError
from gpuworker.engine.logprobs import Head
from gpuworker.engine.sampling import Sampler
from gpuworker.engine.types import (
    LoraSpec,
    SampleResult,
)

from .conftest import CONFIGS, VOCAB_SIZE, load_reference
from .reference import make_adapter, peft_model
from .sampling_requests import GREEDY, WARM, assert_same, finish, make_request, sample, sample_one


@pytest.mark.parametrize("architecture", CONFIGS)
def test_greedy_equals_transformers_generate_for_mixed_adapters(
    architecture: str, load_engine: Callable[..., Engine], model_directory: Callable[[str], Path]
) -> None:
    """Two adapters and the bare model decode in one batch; windows of 8 tokens are passed."""
    engine = load_engine(architecture)
    states = {
        "one": make_adapter(engine, "one", LoraSpec(rank=4, seed=41)),
        "two": make_adapter(engine, "two", LoraSpec(rank=3, seed=42, train_attn=False)),
    }
    for name in states:
        engine.keep_sampler(name, name)
    requests = [
        make_request(f"{name}-{length}", length, sampler_id=name)
        for length in (3, 1, 20)
        for name in ("one", None, "two")
    ]
    results = sample(engine, requests)
    names: list[str | None] = [None, *states]
    for held in names:
        model = load_reference(model_directory(architecture))
        if held is not None:
            model = peft_model(model, states[held])
        for request in (r for r in requests if r.sampler_id == held):
            sequence = results[request.request_id].sequences[0]
            expected, logprobs = generate(model, request.prompt, 12)
            np.testing.assert_array_equal(sequence.tokens, expected)
            np.testing.assert_allclose(sequence.logprobs, logprobs, atol=3e-5, rtol=0)


def generate(model: Any, prompt: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what transformers' own generate continues with, and its log-probabilities."""
    ids = torch.from_numpy(prompt)[None]
    full = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )
    with torch.no_grad():
        logprobs = model(input_ids=full).logits[0].log_softmax(-1)
    new = full[0, len(prompt) :]
    return new.numpy(), logprobs[len(prompt) - 1 : -1].gather(1, new[:, None])[:, 0].numpy()


@pytest.mark.parametrize(("num_threads", "num_mixes"), [(1, 8), (2, 2)])
def test_a_request_does_not_depend_on_its_neighbours(
    num_threads: int,
    num_mixes: int,
    model_directory: Callable[[str], Path],
    set_threads: Callable[[int], None],
) -> None:
    """Every bit stays, whoever joins before, beside or after. The engine probes its row counts at load."""
    set_threads(num_threads)
    engine = Engine.load(model_directory("qwen3"), device="cpu", dtype="float32")
    for i in range(3):
        make_adapter(engine, f"n{i}", LoraSpec(rank=2 + i, seed=i))
        engine.keep_sampler(f"n{i}", f"n{i}")
    rng = np.random.default_rng(0)
    requests = []
    for i in range(12):
        params = replace(WARM, seed=i, max_tokens=int(rng.integers(1, 25)), top_p=0.9 if i % 3 else 1.0)
        request = make_request(f"r{i}", int(rng.integers(1, 40)), sampler_id=f"n{i % 3}", params=params)
        requests.append(replace(request, num_samples=1 + i % 2, prompt_logprobs=i % 4 == 0))
    alone = {request.request_id: sample_one(engine, request) for request in requests}
    for _ in range(num_mixes):
        outcomes: dict[str, SampleResult | EngineError] = {}
        for i in rng.permutation(len(requests))[: rng.integers(2, 12)]:
            engine.sampler.submit(requests[i])
            for _ in range(int(rng.integers(0, 4))):
                outcomes.update(engine.sampler.step())
        outcomes.update(finish(engine.sampler))
        for key, outcome in outcomes.items():
            assert isinstance(outcome, SampleResult)
            for actual, expected in zip(outcome.sequences, alone[key].sequences, strict=True):
                assert_same(actual, expected)
            if alone[key].prompt_logprobs is not None:
                np.testing.assert_array_equal(outcome.prompt_logprobs, alone[key].prompt_logprobs)


def test_the_same_seed_repeats_and_samples_differ(engine: Engine) -> None:
    request = replace(make_request("seed", params=WARM), num_samples=4)
    first, second = sample_one(engine, request), sample_one(engine, request)
    for actual, expected in zip(second.sequences, first.sequences, strict=True):
        assert_same(actual, expected)
    assert len({tuple(s.tokens.tolist()) for s in first.sequences}) == 4
    other = sample_one(engine, replace(request, params=replace(WARM, seed=8)))
    assert other.sequences[0].tokens.tolist() != first.sequences[0].tokens.tolist()
    single = sample_one(engine, replace(request, num_samples=1))
    assert_same(single.sequences[0], first.sequences[0])


def test_more_samples_than_slots_come_in_waves(model_directory: Callable[[str], Path]) -> None:
    base = base_model.load(model_directory("qwen3"), device="cpu", dtype="float32")
    samplers = [
        make_sampler(base, max_slots=3),
        make_sampler(base, max_slots=64),
        make_sampler(base, cache_bytes=base.cache_bytes_per_position(torch.float32) * 128),
        make_sampler(base, grouped=True),
    ]
    request = replace(make_request("waves", params=WARM), num_samples=7, prompt_logprobs=True)
    results = []
    for sampler in samplers:
        sampler.submit(request)
        sampler.submit(make_request("other", 30, params=WARM))
        outcome = finish(sampler)["waves"]
        assert isinstance(outcome, SampleResult)
        results.append(outcome)
    for result in results[1:]:
        np.testing.assert_array_equal(result.prompt_logprobs, results[0].prompt_logprobs)
        for actual, expected in zip(result.sequences, results[0].sequences, strict=True):
            np.testing.assert_array_equal(actual.tokens, expected.tokens)
            np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-5)


def make_sampler(
    base: base_model.BaseModel,
    *,
    max_slots: int = 8,
    prompt_budget: int = 64,
    cache_bytes: int = 1 << 30,
    grouped: bool = False,
) -> Sampler:
    head = Head(base.head_weight, softcap=base.logit_softcap, chunk_rows=512)
    return Sampler(
        base, head, max_slots=max_slots, prompt_budget=prompt_budget, cache_bytes=cache_bytes, grouped=grouped
    )


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3"])
def test_one_grouped_attention_call_gives_the_same_tokens(
    architecture: str, model_directory: Callable[[str], Path]
) -> None:
    """The form meant for GPUs, with windows and softcaps."""
    base = base_model.load(model_directory(architecture), device="cpu", dtype="float32")
    found = []
    for grouped in (False, True):
        sampler = make_sampler(base, grouped=grouped)
        for length in (2, 9, 25):
            sampler.submit(make_request(str(length), length))
        found.append(finish(sampler))
    for key, expected in found[0].items():
        actual = found[1][key]
        assert isinstance(actual, SampleResult)
        assert isinstance(expected, SampleResult)
        np.testing.assert_array_equal(actual.sequences[0].tokens, expected.sequences[0].tokens)
        np.testing.assert_allclose(actual.sequences[0].logprobs, expected.sequences[0].logprobs, atol=1e-5)


def test_the_whole_room_of_the_cache_is_used(model_directory: Callable[[str], Path]) -> None:
    """Pools double while there is room for that, and then grow by what is wanted."""
    base = base_model.load(model_directory("qwen3"), device="cpu", dtype="float32")
    sampler = make_sampler(base, cache_bytes=base.cache_bytes_per_position(torch.float32) * 64 * 7)
    for number in range(4):
        sampler.submit(make_request(f"early{number}", 9, params=replace(GREEDY, max_tokens=50)))
        sampler.step()
    for number in range(4):
        sampler.submit(make_request(f"late{number}", 9, params=replace(GREEDY, max_tokens=50)))
    sampler.step()
    assert len(sampler._running) == 7
    assert sampler.num_pending == 8
    assert len(finish(sampler)) == 8


def test_a_prompt_that_requests_share_is_computed_once(model_directory: Callable[[str], Path]) -> None:
    """The budget of a step holds one such prompt; all of them begin at once and sample what they would alone."""
    base = base_model.load(model_directory("qwen3"), device="cpu", dtype="float32")
    requests = [
        replace(make_request(f"twin{i}", 40, params=replace(WARM, seed=i)), num_samples=1 + i % 2)
        for i in range(5)
    ]
    requests[3] = replace(requests[3], prompt_logprobs=True, topk_prompt_logprobs=2)
    alone = {}
    for request in requests:
        sampler = make_sampler(base)
        sampler.submit(request)
        alone.update(finish(sampler))
    sampler = make_sampler(base, prompt_budget=40)
    for request in requests:
        sampler.submit(request)
    assert sampler.step() == []
    assert all(len(sampler.tokens_of(request.request_id, start=0)) == 1 for request in requests)
    for key, outcome in finish(sampler).items():
        expected = alone[key]
        assert isinstance(outcome, SampleResult)
        assert isinstance(expected, SampleResult)
        for actual, sequence in zip(outcome.sequences, expected.sequences, strict=True):
            assert_same(actual, sequence)
        assert (outcome.prompt_logprobs is None) == (key != "twin3")


def test_prompt_logprobs_match_transformers(engine: Engine, model_directory: Callable[[str], Path]) -> None:
    state = make_adapter(engine, "prompt", LoraSpec(rank=4, seed=43))
    engine.load_sampler("prompt", state)
    request = make_request("prompt", 30, sampler_id="prompt")
    result = sample_one(engine, replace(request, prompt_logprobs=True, topk_prompt_logprobs=3))
    model = peft_model(load_reference(model_directory("qwen3")), state)
    with torch.no_grad():
        expected = model(torch.from_numpy(request.prompt)[None]).logits[0].log_softmax(-1)
    assert result.prompt_logprobs is not None
    assert math.isnan(result.prompt_logprobs[0])
    targets = torch.from_numpy(request.prompt)[1:, None]
    chosen = expected[:-1].gather(1, targets)[:, 0]
    np.testing.assert_allclose(result.prompt_logprobs[1:], chosen, atol=3e-5, rtol=0)
    values, ids = expected[:-1].topk(3)
    assert result.topk_prompt_logprobs is not None
    np.testing.assert_array_equal(result.topk_prompt_logprobs.token_ids[0], [0, 0, 0])
    np.testing.assert_array_equal(
        result.topk_prompt_logprobs.logprobs[0], np.full(3, -99999, dtype=np.float32)
    )
    np.testing.assert_array_equal(result.topk_prompt_logprobs.token_ids[1:], ids)
    np.testing.assert_allclose(result.topk_prompt_logprobs.logprobs[1:], values, atol=3e-5, rtol=0)


def test_prompt_fields_are_absent_unless_asked_for(engine: Engine) -> None:
    result = sample_one(engine, make_request("plain"))
    assert result.prompt_logprobs is None
    assert result.topk_prompt_logprobs is None
    single = replace(make_request("one", 1), prompt_logprobs=True)
    prompt_logprobs = sample_one(engine, single).prompt_logprobs
    assert prompt_logprobs is not None
    assert np.isnan(prompt_logprobs).tolist() == [True]


def test_bfloat16_samples_near_float32(load_engine: Callable[..., Engine]) -> None:
    request = replace(make_request("half", 20), prompt_logprobs=True)
    exact = sample_one(load_engine("qwen3"), request).prompt_logprobs
    half = sample_one(load_engine("qwen3", dtype="bfloat16"), request).prompt_logprobs
    assert exact is not None
    assert half is not None
    assert 0 < np.abs(half[1:] - exact[1:]).max() < 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.array([], dtype=np.int64)}, "1 to 128"),
        ({"prompt": np.zeros(129, dtype=np.int64)}, "1 to 128"),
        ({"prompt": np.array([VOCAB_SIZE])}, "vocabulary"),
        ({"num_samples": 0}, "num_samples"),
        ({"topk_prompt_logprobs": VOCAB_SIZE + 1}, "topk_prompt_logprobs"),
        ({"params": replace(GREEDY, max_tokens=-1)}, "max_tokens"),
        ({"params": replace(GREEDY, temperature=-0.1)}, "temperature"),
        ({"params": replace(GREEDY, temperature=math.nan)}, "temperature"),
        ({"params": replace(GREEDY, top_p=0.0)}, "top_p"),
        ({"params": replace(GREEDY, top_k=-2)}, "top_k"),
        ({"params": replace(GREEDY, stop_strings=("",))}, "stop string"),
    ],
)
def test_it_refuses_requests_it_cannot_serve(engine: Engine, change: dict[str, object], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        engine.sampler.submit(replace(make_request("bad"), **change))  # type: ignore[arg-type]
    assert engine.sampler.num_pending == 0


def test_it_refuses_unknown_samplers_and_ids_in_use(engine: Engine) -> None:
    with pytest.raises(AdapterNotLoaded, match="nobody"):
        engine.sampler.submit(make_request("x", sampler_id="nobody"))
    engine.sampler.submit(make_request("twice"))
    with pytest.raises(SamplingError, match="twice"):
        engine.sampler.submit(make_request("twice"))
    finish(engine.sampler)
