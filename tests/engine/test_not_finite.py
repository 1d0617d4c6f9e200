"""A step of absurd size: what follows may not be finite, Adam's moments and the neighbours stay whole."""

from __future__ import annotations

import math

import numpy as np
import torch

from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import NonFiniteError
from gpuworker.engine.types import (
    AdamParams,
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
)

TOKENS = np.arange(1, 9, dtype=np.int64)


def look(engine: Engine, adapter_id: str) -> ForwardBackwardResult | Exception:
    """Run a forward_backward."""
    datum = Datum(
        tokens=TOKENS[:-1], target_tokens=TOKENS[1:], inputs={"weights": np.ones(7, dtype=np.float32)}
    )
    (answer,) = engine.forward_backward(
        [ForwardBackward(adapter_id=adapter_id, data=(datum,), loss_fn="cross_entropy")]
    )
    return answer


def test_a_learning_rate_of_1e30_is_an_error_of_its_run_alone(engine: Engine) -> None:
    for name in ("wild", "tame"):
        engine.create_adapter(name, LoraSpec(rank=4, seed=1))
    before = look(engine, "tame")
    for _ in range(4):
        look(engine, "wild")
        (step,) = engine.optim_step([OptimStep(adapter_id="wild", params=AdamParams(learning_rate=1e30))])
        assert not isinstance(step, Exception)
        assert math.isfinite(step.grad_norm) or step.skipped
    answer = look(engine, "wild")
    assert isinstance(answer, NonFiniteError)
    assert answer.category == "user"
    state = engine.export_state("wild", optimizer=True, gradients=True)
    assert state.optimizer is not None
    assert torch.isfinite(state.optimizer.exp_avg).all()
    assert torch.isfinite(state.optimizer.exp_avg_sq).all()
    again = look(engine, "tame")
    assert isinstance(before, ForwardBackwardResult)
    assert isinstance(again, ForwardBackwardResult)
    assert again.metrics == before.metrics
