from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpuworker.engine import base_model
from gpuworker.engine.adapters import Adapter, select_modules
from gpuworker.engine.exceptions import (
    OutOfMemory,
)
from gpuworker.engine.logprobs import Head
from gpuworker.engine.training import Trainer
from gpuworker.engine.types import (
    LoraSpec,
)

from .jobs import make_job, results


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
        head = kind(base.head_weight, softcap=None, chunk_rows=512)
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
        head = kind(base.head_weight, softcap=None, chunk_rows=512)
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
    head = Broken(base.head_weight, softcap=None, chunk_rows=512)
    job = make_job("broken", np.random.default_rng(0), [20])
    with pytest.raises(RuntimeError, match="shapes"):
        Trainer(base, head, token_budget=2048).run([job], lambda _: adapter)
