"""Samplers of one rank in one batch, drawn from by two processes that hold parts of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpuworker.engine.engine import Engine
from gpuworker.engine.residency import AdapterMemory
from gpuworker.engine.types import LoraSpec
from gpuworker.group import WorkerGroup

from .sampling_requests import WARM, make_request, sample

pytestmark = pytest.mark.skipif(
    torch.accelerator.current_accelerator() is not None, reason="this torch splits over its GPUs only"
)
NUM_SAMPLERS = 12


@pytest.fixture
def shared(model_directory: Callable[[str], Path]) -> Iterator[Engine]:
    reasons: list[str] = []
    group = WorkerGroup(["cpu", "cpu"], timeout_s=60.0, on_lost=reasons.append)
    yield group.load(model_directory("qwen3"), dtype="float32", adapter_memory=AdapterMemory())
    group.close()
    assert reasons == []


def load_samplers(engine: Engine) -> None:
    for seed in range(NUM_SAMPLERS):
        engine.create_adapter("source", LoraSpec(rank=4, seed=seed))
        state = engine.export_state("source", optimizer=False, gradients=False)
        noise = torch.randn(state.weights.shape, generator=torch.Generator().manual_seed(seed))
        engine.load_sampler(f"own-{seed}", replace(state, weights=state.weights + noise * 0.1))


def test_rows_of_many_samplers_have_one_order_in_all_processes(shared: Engine, engine: Engine) -> None:
    """Where processes order them differently, the parts of their sums belong to different rows."""
    requests = [
        make_request(f"own-{number}", 5 + number, sampler_id=f"own-{number}", params=WARM)
        for number in range(NUM_SAMPLERS)
    ]
    alone = {}
    load_samplers(engine)
    for request in requests:
        alone.update(sample(engine, [request]))
    load_samplers(shared)
    together = sample(shared, requests)
    for request in requests:
        ours, theirs = (found[request.request_id].sequences[0] for found in (together, alone))
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
