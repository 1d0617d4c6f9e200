"""The engine on a CUDA device against the engine on the CPU; skipped where there is no such device.

A machine that has torch and transformers but not the rest of the product runs these with
`pytest -c /dev/null --rootdir . --confcutdir tests/engine tests/engine/test_gpu.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import EngineError, OutOfMemory
from gpuworker.engine.types import (
    AdamParams,
    ForwardBackward,
    ForwardBackwardResult,
    OptimStep,
    SampleRequest,
    SampleResult,
)

from .conftest import CONFIGS, VOCAB_SIZE
from .jobs import make_job, results, take_gradient
from .reference import make_adapter
from .sampling_requests import GREEDY, finish, make_request, mixed_requests, sample
from .test_training import ALL_SPECS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LENGTHS = [21, 1, 64, 9]
STEP = AdamParams(learning_rate=1e-2, grad_clip_norm=1.0, weight_decay=0.01)


@pytest.fixture(scope="module")
def load_gpu_engine(model_directory: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """Return an engine on the device; engines are shared, so tests use adapter ids of their own."""
    made: dict[tuple[str, str], Engine] = {}

    def load(name: str = "qwen3", *, dtype: str = "float32") -> Engine:
        if (name, dtype) not in made:
            made[name, dtype] = Engine.load(model_directory(name), device="cuda", dtype=dtype)
        return made[name, dtype]

    yield load
    made.clear()
    torch.cuda.empty_cache()


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Leave this process some 100 MB of the device."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (100 << 20)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=0))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_float32_gives_what_the_cpu_gives(
    architecture: str, load_engine: Callable[..., Engine], load_gpu_engine: Callable[..., Engine]
) -> None:
    engines = [load_engine(architecture), load_gpu_engine(architecture)]
    jobs = [make_job(f"gpu-{i}", np.random.default_rng(i), LENGTHS) for i in range(len(ALL_SPECS))]
    for engine in engines:
        for job, spec in zip(jobs, ALL_SPECS, strict=True):
            make_adapter(engine, job.adapter_id, spec)
    ours, theirs = (results(engine.forward_backward(jobs)) for engine in reversed(engines))
    for mine, expected in zip(ours, theirs, strict=True):
        for left, right in zip(mine.logprobs, expected.logprobs, strict=True):
            np.testing.assert_allclose(left, right, atol=1e-4, rtol=0)
    for job in jobs:
        gradient, on_cpu = (take_gradient(engine, job.adapter_id) for engine in reversed(engines))
        assert (gradient - on_cpu).norm() / on_cpu.norm() < 1e-3


@pytest.mark.parametrize("architecture", CONFIGS)
def test_bfloat16_is_near_the_float32_of_the_cpu(
    architecture: str, load_engine: Callable[..., Engine], load_gpu_engine: Callable[..., Engine]
) -> None:
    """Through the varlen kernel, where the model has no softcap."""
    cpu, gpu = load_engine(architecture), load_gpu_engine(architecture, dtype="bfloat16")
    job, spec = make_job("half", np.random.default_rng(1), LENGTHS), ALL_SPECS[0]
    for engine in (cpu, gpu):
        make_adapter(engine, "half", spec)
    (mine,), (expected,) = (results(engine.forward_backward([job])) for engine in (gpu, cpu))
    gaps = [np.abs(a - b).mean() for a, b in zip(mine.logprobs, expected.logprobs, strict=True)]
    assert float(np.mean(gaps)) < 0.1
    assert cosine(take_gradient(gpu, "half"), take_gradient(cpu, "half")) > 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_jobs_equal_lone_ones_within_rounding(
    dtype: str, load_gpu_engine: Callable[..., Engine]
) -> None:
    engine = load_gpu_engine(dtype=dtype)
    jobs = [make_job(f"mix-{i}", np.random.default_rng(i), LENGTHS[i:]) for i in range(3)]
    alone = []
    for job, spec in zip(jobs, ALL_SPECS, strict=False):
        make_adapter(engine, job.adapter_id, spec)
        engine.forward_backward([job])
        alone.append(take_gradient(engine, job.adapter_id))
    results(engine.forward_backward(jobs))
    for job, expected in zip(jobs, alone, strict=True):
        gap = (take_gradient(engine, job.adapter_id) - expected).norm() / expected.norm()
        assert gap < (1e-5 if dtype == "float32" else 3e-2)


def test_steps_end_at_the_weights_of_the_cpu(
    load_engine: Callable[..., Engine], load_gpu_engine: Callable[..., Engine]
) -> None:
    states = []
    for engine in (load_gpu_engine(), load_engine()):
        make_adapter(engine, "steps", ALL_SPECS[0])
        for seed in range(4):
            results(engine.forward_backward([make_job("steps", np.random.default_rng(seed), LENGTHS)]))
            engine.optim_step([OptimStep(adapter_id="steps", params=STEP)])
        states.append(engine.export_state("steps", optimizer=True, gradients=True))
    ours, theirs = states
    assert ours.step == theirs.step == 4
    assert cosine(ours.weights, theirs.weights) > 0.999


def test_a_state_comes_back_from_the_host_with_the_same_bits(load_gpu_engine: Callable[..., Engine]) -> None:
    engine = load_gpu_engine(dtype="bfloat16")
    make_adapter(engine, "kept", ALL_SPECS[0])
    results(engine.forward_backward([make_job("kept", np.random.default_rng(3), LENGTHS)]))
    engine.optim_step([OptimStep(adapter_id="kept", params=STEP)])
    results(engine.forward_backward([make_job("kept", np.random.default_rng(4), LENGTHS)]))
    state = engine.export_state("kept", optimizer=True, gradients=True)
    engine.import_state("again", state, optimizer=True)
    back = engine.export_state("again", optimizer=True, gradients=True)
    assert state.optimizer is not None
    assert back.optimizer is not None
    assert state.gradient is not None
    assert back.gradient is not None
    assert torch.equal(back.weights, state.weights)
    assert torch.equal(back.gradient, state.gradient)
    assert torch.equal(back.optimizer.exp_avg, state.optimizer.exp_avg)
    assert torch.equal(back.optimizer.exp_avg_sq, state.optimizer.exp_avg_sq)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_greedy_samples_of_mixed_adapters_are_those_of_the_cpu(
    architecture: str, load_engine: Callable[..., Engine], load_gpu_engine: Callable[..., Engine]
) -> None:
    expected, actual = (
        sample(engine, mixed_requests(engine))
        for engine in (load_engine(architecture), load_gpu_engine(architecture))
    )
    for request_id, result in expected.items():
        ours = actual[request_id].sequences[0]
        np.testing.assert_array_equal(ours.tokens, result.sequences[0].tokens)
        np.testing.assert_allclose(ours.logprobs, result.sequences[0].logprobs, atol=1e-3)


def test_bfloat16_samples_repeat_and_score_as_a_forward_pass_would(
    load_gpu_engine: Callable[..., Engine],
) -> None:
    engine = load_gpu_engine(dtype="bfloat16")
    warm = replace(GREEDY, temperature=1.0, seed=7, top_p=0.95, max_tokens=40)
    requests = [replace(r, params=warm, num_samples=4) for r in mixed_requests(engine)]
    sample(engine, requests)  # records the steps of these sizes
    first, second = (sample(engine, requests) for _ in range(2))
    for request in requests:
        result = first[request.request_id]
        assert [list(s.tokens) for s in result.sequences] == [
            list(s.tokens) for s in second[request.request_id].sequences
        ]
        scores = _prompt_logprobs(engine, request, result)
        np.testing.assert_allclose(result.sequences[0].logprobs, scores, atol=0.15)


def test_more_adapters_than_before_are_recorded_again(
    load_gpu_engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    """A bank of another size drops what was recorded with the smaller one, and the memory behind it."""
    engine = load_gpu_engine(dtype="bfloat16")
    requests = mixed_requests(engine)
    for chosen in (requests[:1], requests, requests[:1]):
        for _ in range(2):
            sample(engine, chosen)
    assert not caplog.records
    assert engine.sampler._graphs is not None
    assert any(step.graph is not None for step in engine.sampler._graphs._steps.values())


@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name != "gemma2"])
def test_recorded_passes_give_what_the_plain_way_gives(
    architecture: str, load_gpu_engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    """Batches of other runs and sizes take turns with sampling; new weights reach what is recorded."""
    engine = load_gpu_engine(architecture, dtype="bfloat16")
    graphs = engine._trainer._graphs
    assert graphs is not None
    jobs = [make_job(f"way-{i}", np.random.default_rng(i), LENGTHS[i % 3 :]) for i in range(len(ALL_SPECS))]
    for seed in (0, 100):
        for job, spec in zip(jobs, ALL_SPECS, strict=True):
            make_adapter(engine, job.adapter_id, replace(spec, seed=spec.seed + seed))
        for chosen in (jobs, jobs[:1], jobs[1:3]):
            engine._trainer._graphs = None
            expected = _trained(engine, chosen)
            engine._trainer._graphs = graphs
            for _ in range(4):
                actual = _trained(engine, chosen)
                sample(engine, mixed_requests(engine)[:1])
            for (ours, ours_P), (theirs, theirs_P) in zip(actual, expected, strict=True):
                gaps = [np.abs(a - b).mean() for a, b in zip(ours.logprobs, theirs.logprobs, strict=True)]
                assert float(np.mean(gaps)) < 0.1
                assert cosine(ours_P, theirs_P) > 0.99
    assert sum(one.pool is not None for one in graphs._passes.values()) == 3
    assert not caplog.records


def _trained(
    engine: Engine, jobs: Sequence[ForwardBackward]
) -> list[tuple[ForwardBackwardResult, torch.Tensor]]:
    """Return what every job answers, and its gradient."""
    outcomes = results(engine.forward_backward(jobs))
    return [(one, take_gradient(engine, job.adapter_id)) for job, one in zip(jobs, outcomes, strict=True)]


def _prompt_logprobs(engine: Engine, request: SampleRequest, result: SampleResult) -> np.ndarray:
    """Return the log-probabilities of a result's first tokens as part of a prompt."""
    tokens = result.sequences[0].tokens
    whole = np.concatenate([request.prompt, tokens])
    params = replace(GREEDY, max_tokens=0)
    again = replace(
        request,
        request_id="again",
        prompt=whole,
        params=params,
        num_samples=1,
        prompt_logprobs=True,
        topk_prompt_logprobs=0,
    )
    scores = sample(engine, [again])["again"].prompt_logprobs
    assert scores is not None
    return scores[-len(tokens) :]


def test_a_job_without_room_fails_alone_and_the_next_one_works(
    load_gpu_engine: Callable[..., Engine], little_memory: None
) -> None:
    engine = load_gpu_engine()
    make_adapter(engine, "large", ALL_SPECS[0])
    large = make_job("large", np.random.default_rng(0), [120] * 1500)
    small = make_job("large", np.random.default_rng(0), LENGTHS)
    outcome, other = engine.forward_backward([large, small])
    assert not isinstance(other, EngineError)
    assert isinstance(outcome, OutOfMemory) or not isinstance(outcome, EngineError)
    results(engine.forward_backward([small]))


def test_sampling_without_room_fails_and_the_next_request_works(
    load_gpu_engine: Callable[..., Engine], little_memory: None
) -> None:
    engine = load_gpu_engine("llama")
    params = replace(GREEDY, max_tokens=60)
    for number in range(200):
        engine.sampler.submit(make_request(f"room-{number}", 60, params=params))
    outcomes = finish(engine.sampler)
    assert len(outcomes) == 200
    assert all(isinstance(o, SampleResult | OutOfMemory) for o in outcomes.values())
    assert len(sample(engine, [make_request("after", 5)])["after"].sequences[0].tokens) == GREEDY.max_tokens


def test_tokens_of_every_job_are_inside_the_vocabulary(load_gpu_engine: Callable[..., Engine]) -> None:
    """A token outside of it would end the device's context and with it every run."""
    engine = load_gpu_engine()
    make_adapter(engine, "odd", ALL_SPECS[0])
    job = make_job("odd", np.random.default_rng(0), [8])
    datum = replace(job.data[0], tokens=np.full(8, VOCAB_SIZE, dtype=np.int64))
    (outcome,) = engine.forward_backward([replace(job, data=(datum,))])
    assert isinstance(outcome, EngineError)
    results(engine.forward_backward([job]))
