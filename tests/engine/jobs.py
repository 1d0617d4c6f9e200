"""Jobs of random tokens and what comes back of them."""

from __future__ import annotations

import numpy as np
import torch

from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import (
    EngineError,
)
from gpuworker.engine.types import (
    AdamParams,
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    OptimStep,
)

from .conftest import random_tokens


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
