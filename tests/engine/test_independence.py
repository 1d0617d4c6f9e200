from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import (
    AdapterNotLoaded,
    DatumError,
    EngineError,
    LossFunctionError,
    NonFiniteError,
)
from gpuworker.engine.types import (
    ForwardBackward,
    LoraSpec,
)

from .conftest import VOCAB_SIZE
from .jobs import make_datum, make_job, results, take_gradient
from .reference import make_adapter


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
            rank=int(rng.integers(1, 17)),
            seed=i,
            train_attn=i % 3 != 0,
            train_mlp=i % 4 != 2,
            train_unembed=i % 2 == 0,
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


def test_bfloat16_results_do_not_depend_on_neighbours(load_engine: Callable[..., Engine]) -> None:
    engine, rng = load_engine("qwen3", dtype="bfloat16"), np.random.default_rng(12)
    make_adapter(engine, "half", LoraSpec(rank=4, seed=1))
    make_adapter(engine, "other", LoraSpec(rank=6, seed=2))
    for lengths in ([33, 12], [33, 100]):  # attention takes sequences above 64 rows another way
        job = make_job("half", rng, lengths)
        (alone,) = results(engine.forward_backward([job]))
        gradient = take_gradient(engine, "half")
        mixed = results(engine.forward_backward([make_job("other", rng, [70, 3]), job]))
        for one, other in zip(mixed[1].logprobs, alone.logprobs, strict=True):
            np.testing.assert_array_equal(one, other)
        assert torch.equal(take_gradient(engine, "half"), gradient)
