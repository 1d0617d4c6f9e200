from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpuworker.engine.engine import Engine
from gpuworker.engine.types import (
    AdamParams,
    Datum,
    ForwardBackward,
    LoraSpec,
    OptimStep,
)

from .conftest import CONFIGS, VOCAB_SIZE, load_reference, random_tokens
from .jobs import make_job, results, take_gradient
from .reference import assert_close, make_adapter, peft_cross_entropy, peft_model

ALL_SPECS = (
    LoraSpec(rank=4, seed=11),
    LoraSpec(rank=8, seed=12, train_unembed=False),
    LoraSpec(rank=3, seed=13, train_attn=False, train_unembed=False),
    LoraSpec(rank=2, seed=14, train_mlp=False),
    LoraSpec(rank=5, seed=15, train_attn=False, train_mlp=False),
)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_packed_jobs_match_transformers_and_peft(
    architecture: str, load_engine: Callable[..., Engine], model_directory: Callable[[str], Path]
) -> None:
    engine, rng = load_engine(architecture), np.random.default_rng(5)
    states = [make_adapter(engine, f"peft-{i}", spec) for i, spec in enumerate(ALL_SPECS)]
    jobs = [make_job(f"peft-{i}", rng, [21, 1, 9 + i]) for i in range(len(ALL_SPECS))]
    outcomes = results(engine.forward_backward(jobs))
    for job, state, result in zip(jobs, states, outcomes, strict=True):
        model = peft_model(load_reference(model_directory(architecture)), state)
        logprobs, gradients = peft_cross_entropy(model, state, job.data)
        for ours, theirs in zip(result.logprobs, logprobs, strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=0)
        loss = -sum(float((d.inputs["weights"] * p).sum()) for d, p in zip(job.data, logprobs, strict=True))
        assert result.metrics["loss:sum"] == pytest.approx(loss, abs=1e-3)
        views = state.layout.views(take_gradient(engine, job.adapter_id))
        for name, expected in gradients.items():
            assert_close(views[name].a, expected.a)
            assert_close(views[name].b, expected.b)


def test_one_job_of_many_batches_matches_peft(engine: Engine, model_directory: Callable[[str], Path]) -> None:
    """3,000 rows of one job: more than a block, a batch and a head chunk."""
    state = make_adapter(engine, "many", LoraSpec(rank=4, seed=3))
    rng = np.random.default_rng(1)
    job = make_job("many", rng, [100] * 30)
    (result,) = results(engine.forward_backward([job]))
    model = peft_model(load_reference(model_directory("qwen3")), state)
    logprobs, gradients = peft_cross_entropy(model, state, job.data)
    for ours, theirs in zip(result.logprobs, logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=0)
    views = state.layout.views(take_gradient(engine, "many"))
    for name, expected in gradients.items():
        assert_close(views[name].a, expected.a)
        assert_close(views[name].b, expected.b)


def test_forward_returns_the_same_logprobs_and_no_gradient(engine: Engine) -> None:
    make_adapter(engine, "forward", LoraSpec(rank=4, seed=4))
    job = make_job("forward", np.random.default_rng(3), [12, 30])
    forward, backward = results(engine.forward_backward([replace(job, backward=False), job]))
    assert forward.metrics == backward.metrics
    for ours, theirs in zip(forward.logprobs, backward.logprobs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    take_gradient(engine, "forward")
    results(engine.forward_backward([replace(job, backward=False)]))
    assert engine.export_state("forward", optimizer=False, gradients=True).gradient is None


def test_gradients_of_one_adapter_accumulate_in_order(engine: Engine) -> None:
    make_adapter(engine, "sum", LoraSpec(rank=4, seed=5))
    rng = np.random.default_rng(4)
    first, second = make_job("sum", rng, [10]), make_job("sum", rng, [17, 4])
    gradients = []
    for job in (first, second):
        results(engine.forward_backward([job]))
        gradients.append(take_gradient(engine, "sum"))
    results(engine.forward_backward([first, second]))
    together = take_gradient(engine, "sum")
    results(engine.forward_backward([first]))
    results(engine.forward_backward([second]))
    assert torch.equal(take_gradient(engine, "sum"), together)
    assert torch.equal(together, gradients[0] + gradients[1])


def test_metrics_count_tokens_and_weights(engine: Engine) -> None:
    make_adapter(engine, "metrics", LoraSpec(rank=2, seed=1))
    tokens = random_tokens(np.random.default_rng(0), 5)
    weights = np.array([0.0, -2.0, 0.5, 0.0], dtype=np.float32)
    weighted = Datum(tokens=tokens[:-1], target_tokens=tokens[1:], inputs={"weights": weights})
    ones = np.ones(4, dtype=np.float32)
    ratio = replace(weighted, inputs={"logprobs": -ones, "advantages": weights})
    outcomes = results(
        engine.forward_backward(
            [
                ForwardBackward(adapter_id="metrics", data=(weighted, weighted), loss_fn="cross_entropy"),
                ForwardBackward(adapter_id="metrics", data=(ratio,), loss_fn="importance_sampling"),
            ]
        )
    )
    assert outcomes[0].metrics["tokens:sum"] == 8
    assert outcomes[0].metrics["loss_weight:sum"] == 5.0
    assert outcomes[1].metrics["loss_weight:sum"] == 2.0
    assert all(name.count(":") == 1 for name in outcomes[0].metrics)


def test_two_dimensional_targets_match_peft(engine: Engine, model_directory: Callable[[str], Path]) -> None:
    """(N, K) targets, beside (N,) targets of the same job and K of another width."""
    state = make_adapter(engine, "wide", LoraSpec(rank=4, seed=6))
    rng = np.random.default_rng(7)
    data = [
        Datum(
            tokens=random_tokens(rng, shape[0]),
            target_tokens=rng.integers(0, VOCAB_SIZE, size=shape),
            inputs={"weights": rng.normal(size=shape).astype(np.float32)},
        )
        for shape in ((9, 3), (6, 2), (5,))
    ]
    job = ForwardBackward(adapter_id="wide", data=tuple(data), loss_fn="cross_entropy")
    (result,) = results(engine.forward_backward([job]))
    model = peft_model(load_reference(model_directory("qwen3")), state)
    logprobs, gradients = peft_cross_entropy(model, state, data)
    for ours, theirs in zip(result.logprobs, logprobs, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=0)
    views = state.layout.views(take_gradient(engine, "wide"))
    for name, expected in gradients.items():
        assert_close(views[name].a, expected.a)
        assert_close(views[name].b, expected.b)


def test_bfloat16_stays_near_float32(load_engine: Callable[..., Engine]) -> None:
    job = make_job("bf16", np.random.default_rng(11), [40, 25])
    found = []
    for dtype in ("float32", "bfloat16"):
        engine = load_engine("qwen3", dtype=dtype)
        make_adapter(engine, "bf16", LoraSpec(rank=4, seed=9))
        (result,) = results(engine.forward_backward([job]))
        found.append((np.concatenate(result.logprobs), take_gradient(engine, "bf16")))
    assert np.abs(found[1][0] - found[0][0]).max() < 0.3
    error = (found[1][1] - found[0][1]).norm() / found[0][1].norm()
    assert 0 < error < 0.05


def test_training_lowers_the_loss(engine: Engine) -> None:
    engine.create_adapter("learn", LoraSpec(rank=8, seed=1))
    job = make_job("learn", np.random.default_rng(13), [30])
    weights = {"weights": np.ones(30, dtype=np.float32)}
    job = replace(job, data=(replace(job.data[0], inputs=weights),))
    losses = []
    for _ in range(15):
        losses.append(results(engine.forward_backward([job]))[0].metrics["loss:sum"])
        engine.optim_step([OptimStep(adapter_id="learn", params=AdamParams(learning_rate=0.02))])
    assert losses[-1] < 0.3 * losses[0]
