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
from gpuworker.engine.adapters import Adapter, select_modules
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import (
    AdapterNotLoaded,
    DatumError,
    EngineError,
    LossFunctionError,
    NonFiniteError,
    OutOfMemory,
)
from gpuworker.engine.logprobs import Head
from gpuworker.engine.training import Trainer
from gpuworker.engine.types import (
    AdamParams,
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
)

from .conftest import CONFIGS, VOCAB_SIZE, load_reference, random_tokens
from .reference import assert_close, make_adapter, peft_cross_entropy, peft_model

ALL_SPECS = (
    LoraSpec(rank=4, seed=11),
    LoraSpec(rank=8, seed=12, train_unembed=False),
    LoraSpec(rank=3, seed=13, train_attn=False, train_unembed=False),
    LoraSpec(rank=2, seed=14, train_mlp=False),
    LoraSpec(rank=5, seed=15, train_attn=False, train_mlp=False),
)


def make_datum(rng: np.random.Generator, length: int, *, trained_share: float = 0.6) -> Datum:
    tokens = random_tokens(rng, length + 1)
    weights = rng.normal(size=length).astype(np.float32)
    weights *= rng.random(length) < trained_share
    weights[-1] = 1.0
    return Datum(tokens=tokens[:-1], target_tokens=tokens[1:], inputs={"weights": weights})


def make_job(adapter_id: str, rng: np.random.Generator, lengths: list[int]) -> ForwardBackward:
    data = tuple(make_datum(rng, length) for length in lengths)
    return ForwardBackward(adapter_id=adapter_id, data=data, loss_fn="cross_entropy")


def results(outcomes: list[ForwardBackwardResult | EngineError]) -> list[ForwardBackwardResult]:
    for outcome in outcomes:
        if isinstance(outcome, EngineError):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, ForwardBackwardResult)]


def take_gradient(engine: Engine, adapter_id: str) -> torch.Tensor:
    """Return the accumulated gradient and clear it without moving the weights."""
    gradient = engine.export_state(adapter_id, optimizer=False, gradients=True).gradient
    assert gradient is not None
    engine.optim_step([OptimStep(adapter_id=adapter_id, params=AdamParams(learning_rate=0.0))])
    return gradient


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


@pytest.mark.parametrize(("num_threads", "num_mixes"), [(1, 40), (2, 5)])
def test_results_do_not_depend_on_neighbours(
    num_threads: int, num_mixes: int, engine: Engine, set_threads: Callable[[int], None]
) -> None:
    """Random mixes of up to 7 other jobs leave every bit of a job as it is alone."""
    set_threads(num_threads)
    rng = np.random.default_rng(2)
    jobs, alone = [], []
    for i in range(12):
        spec = LoraSpec(
            rank=int(rng.integers(1, 17)), seed=i, train_attn=i % 3 != 0, train_unembed=i % 2 == 0
        )
        make_adapter(engine, f"mix-{i}", spec)
        lengths = [int(n) for n in rng.integers(1, 90, size=rng.integers(1, 9))]
        # The first four are smaller than any batch may be: 1, 3, 5 and 10 rows.
        lengths = {0: [1], 1: [3], 2: [2, 3], 3: [10]}.get(i, lengths)
        jobs.append(make_job(f"mix-{i}", rng, lengths))
    for job in jobs:
        (result,) = results(engine.forward_backward([job]))
        alone.append((result, take_gradient(engine, job.adapter_id)))
    for _ in range(num_mixes):
        chosen = rng.permutation(len(jobs))[: rng.integers(2, 9)]
        mixed = results(engine.forward_backward([jobs[i] for i in chosen]))
        for i, result in zip(chosen, mixed, strict=True):
            expected, gradient = alone[i]
            assert result.metrics == expected.metrics
            for ours, theirs in zip(result.logprobs, expected.logprobs, strict=True):
                np.testing.assert_array_equal(ours, theirs)
            assert torch.equal(take_gradient(engine, jobs[i].adapter_id), gradient)


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


def _bad_jobs() -> dict[str, tuple[ForwardBackward, type[EngineError], str]]:
    good = make_datum(np.random.default_rng(8), 4)
    job = ForwardBackward(adapter_id="bad", data=(good,), loss_fn="cross_entropy")

    def with_datum(**changes: Any) -> ForwardBackward:
        return replace(job, data=(good, replace(good, **changes)))

    inputs = dict(good.inputs)
    return {
        "unknown adapter": (replace(job, adapter_id="nobody"), AdapterNotLoaded, "nobody"),
        "no data": (replace(job, data=()), DatumError, "at least one"),
        "token outside": (with_datum(tokens=np.array([1, 2, 3, VOCAB_SIZE])), DatumError, str(VOCAB_SIZE)),
        "negative target": (with_datum(target_tokens=np.array([1, 2, 3, -1])), DatumError, "-1"),
        "too long": (
            with_datum(tokens=np.zeros(129, dtype=np.int64), target_tokens=np.zeros(129, dtype=np.int64)),
            DatumError,
            "128",
        ),
        "lengths differ": (with_datum(target_tokens=np.array([1, 2, 3])), DatumError, "target_tokens"),
        "empty": (with_datum(tokens=good.tokens[:0], target_tokens=good.tokens[:0]), DatumError, "1 to 128"),
        "weights of another shape": (
            with_datum(inputs={"weights": np.ones(3, np.float32)}),
            DatumError,
            "weights",
        ),
        "unknown loss": (replace(job, loss_fn="gspo"), LossFunctionError, "cross_entropy"),
        "config key": (replace(job, loss_config={"beta": 1.0}), LossFunctionError, "beta"),
        "missing tensor": (replace(job, loss_fn="ppo"), LossFunctionError, "logprobs"),
        "unexpected tensor": (
            with_datum(inputs=inputs | {"advantages": inputs["weights"]}),
            LossFunctionError,
            "advantages",
        ),
        "not a number": (
            with_datum(inputs={"weights": np.full(4, np.nan, np.float32)}),
            NonFiniteError,
            "nan",
        ),
        "gradient overflow": (
            with_datum(inputs={"weights": np.full(4, 3e38, np.float32)}),
            NonFiniteError,
            "",
        ),
    }


@pytest.mark.parametrize("case", _bad_jobs())
def test_a_bad_job_fails_alone(engine: Engine, case: str) -> None:
    bad, error, message = _bad_jobs()[case]
    make_adapter(engine, "bad", LoraSpec(rank=4, seed=7))
    make_adapter(engine, "good", LoraSpec(rank=4, seed=8))
    rng = np.random.default_rng(9)
    before, beside = make_job("bad", rng, [7]), make_job("good", rng, [9, 20])
    (alone,) = results(engine.forward_backward([beside]))
    beside_gradient = take_gradient(engine, "good")
    results(engine.forward_backward([before]))
    kept = engine.export_state("bad", optimizer=False, gradients=True).gradient
    outcomes = engine.forward_backward([bad, beside])
    assert type(outcomes[0]) is error
    assert message in str(outcomes[0])
    (neighbour,) = results(outcomes[1:])
    assert neighbour.metrics == alone.metrics
    assert torch.equal(take_gradient(engine, "good"), beside_gradient)
    after = engine.export_state("bad", optimizer=False, gradients=True).gradient
    assert kept is not None
    assert after is not None
    assert torch.equal(after, kept)


def test_a_diverged_adapter_does_not_reach_its_neighbours(engine: Engine) -> None:
    state = make_adapter(engine, "nan", LoraSpec(rank=4, seed=1))
    engine.import_state("nan", replace(state, weights=state.weights * math.nan), optimizer=False)
    make_adapter(engine, "well", LoraSpec(rank=4, seed=2))
    rng = np.random.default_rng(10)
    sick, well = make_job("nan", rng, [9]), make_job("well", rng, [8])
    (alone,) = results(engine.forward_backward([well]))
    gradient = take_gradient(engine, "well")
    outcomes = engine.forward_backward([sick, well])
    assert isinstance(outcomes[0], NonFiniteError)
    assert results(outcomes[1:])[0].metrics == alone.metrics
    assert torch.equal(take_gradient(engine, "well"), gradient)


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


def test_bfloat16_results_do_not_depend_on_neighbours(load_engine: Callable[..., Engine]) -> None:
    engine, rng = load_engine("qwen3", dtype="bfloat16"), np.random.default_rng(12)
    make_adapter(engine, "half", LoraSpec(rank=4, seed=1))
    make_adapter(engine, "other", LoraSpec(rank=6, seed=2))
    job = make_job("half", rng, [33, 12])
    (alone,) = results(engine.forward_backward([job]))
    gradient = take_gradient(engine, "half")
    mixed = results(engine.forward_backward([make_job("other", rng, [70, 3]), job]))
    np.testing.assert_array_equal(mixed[1].logprobs[0], alone.logprobs[0])
    assert torch.equal(take_gradient(engine, "half"), gradient)


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


class _SmallHead(Head):
    """A head on a device without room for more than 40 rows: the allocator really refuses."""

    def base_logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        if len(hidden_CD) > 40:
            torch.empty(2**50)
        return super().base_logits(hidden_CD)


def test_jobs_without_room_for_all_run_one_by_one(model_directory: Callable[[str], Path]) -> None:
    base = base_model.load(model_directory("qwen3"), device="cpu", dtype="float32")
    rng = np.random.default_rng(14)
    adapters = {}
    for i in range(4):
        spec = LoraSpec(rank=2 + i, seed=i)
        layout = select_modules(spec, base.modules, max_rank=64)
        adapters[str(i)] = Adapter(spec, layout, device=base.device, dtype=base.dtype)
        adapters[str(i)].initialize()
    jobs = [make_job(str(i), rng, [length]) for i, length in enumerate((20, 30, 100, 12))]
    jobs = [
        replace(
            job,
            data=tuple(replace(d, inputs={"weights": np.ones_like(d.inputs["weights"])}) for d in job.data),
        )
        for job in jobs
    ]
    found = []
    for kind in (Head, _SmallHead):
        head = kind(base.head_weight_VD, softcap=None, chunk_rows=512)
        outcomes = Trainer(base, head, token_budget=2048).run(jobs, adapters.__getitem__)
        found.append((outcomes, {key: a.gradient_P for key, a in adapters.items()}))
        for adapter in adapters.values():
            adapter.gradient_P = None
    (plenty, expected), (tight, gradients) = found
    assert isinstance(tight[2], OutOfMemory)
    assert gradients["2"] is None
    for i in (0, 1, 3):
        actual, wanted = gradients[str(i)], expected[str(i)]
        assert actual is not None
        assert wanted is not None
        assert torch.equal(actual, wanted)
        assert results([tight[i]])[0].metrics == results([plenty[i]])[0].metrics


def test_a_job_without_room_even_alone_runs_in_smaller_batches(
    model_directory: Callable[[str], Path],
) -> None:
    base = base_model.load(model_directory("qwen3"), device="cpu", dtype="float32")
    spec = LoraSpec(rank=4, seed=1)
    adapter = Adapter(
        spec, select_modules(spec, base.modules, max_rank=64), device=base.device, dtype=base.dtype
    )
    adapter.initialize()
    job = make_job("large", np.random.default_rng(15), [30, 28, 25])
    ones = [{"weights": np.ones_like(datum.inputs["weights"])} for datum in job.data]
    job = replace(job, data=tuple(replace(d, inputs=i) for d, i in zip(job.data, ones, strict=True)))
    gradients, metrics = [], []
    for kind in (Head, _SmallHead):
        head = kind(base.head_weight_VD, softcap=None, chunk_rows=512)
        (outcome,) = results(Trainer(base, head, token_budget=96).run([job], lambda _: adapter))
        metrics.append(outcome.metrics["loss:sum"])
        gradients.append(adapter.gradient_P)
        adapter.gradient_P = None
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory(
    model_directory: Callable[[str], Path],
) -> None:
    class Broken(Head):
        def base_logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
            return hidden_CD.mm(hidden_CD)

    base = base_model.load(model_directory("qwen3"), device="cpu", dtype="float32")
    spec = LoraSpec(rank=2, seed=1)
    adapter = Adapter(
        spec, select_modules(spec, base.modules, max_rank=64), device=base.device, dtype=base.dtype
    )
    head = Broken(base.head_weight_VD, softcap=None, chunk_rows=512)
    job = make_job("broken", np.random.default_rng(0), [20])
    with pytest.raises(RuntimeError, match="shapes"):
        Trainer(base, head, token_budget=2048).run([job], lambda _: adapter)
