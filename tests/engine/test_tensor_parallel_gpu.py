"""A base model over two GPUs against one on the CPU; skipped where there are fewer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gpuworker.engine.engine import Engine
from gpuworker.engine.residency import AdapterMemory
from gpuworker.engine.types import SampleRequest, SamplingParams
from gpuworker.group import WorkerGroup

from .conftest import random_tokens
from .jobs import make_job, results
from .test_tensor_parallel import draw, gradient_of, hold, largest_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices"),
]
# Of log-probabilities, and one minus the cosine of the gradients.
TOLERANCES = {"float32": (1e-3, 1e-5), "bfloat16": (0.5, 0.02)}


@pytest.fixture(scope="module")
def group() -> Iterator[WorkerGroup]:
    reasons: list[str] = []
    made = WorkerGroup(["cuda:0", "cuda:1"], timeout_s=120.0, on_lost=reasons.append)
    yield made
    made.close()
    assert not reasons


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_two_gpus_give_what_the_cpu_gives(
    dtype: str, group: WorkerGroup, load_engine: Callable[..., Engine], model_directory: Callable[[str], Path]
) -> None:
    of_logprobs, of_gradients = TOLERANCES[dtype]
    shared = group.load(model_directory("qwen3"), dtype=dtype, adapter_memory=AdapterMemory())
    rng = np.random.default_rng(1)
    jobs = [make_job("g", rng, [21, 9]), make_job("g", rng, [33])]
    prompt = random_tokens(rng, 7)
    params = SamplingParams(max_tokens=8, seed=1, temperature=1.0, stop_tokens=())
    answers, gradients = [], []
    for engine in (load_engine(), shared):
        hold(engine, "g")
        answers.append(results(engine.forward_backward(jobs)))
        gradients.append(gradient_of(engine, "g")[1].double())
    assert largest_difference(answers[1], answers[0]) < of_logprobs
    assert 1 - float(torch.cosine_similarity(gradients[1], gradients[0], dim=0)) < of_gradients
    shared.keep_sampler("g", "g")
    drawn = draw(shared, SampleRequest(request_id="r", sampler_id="g", prompt=prompt, params=params))
    assert len(drawn.sequences[0].tokens) == 8
    shared.export_state("g", optimizer=True, gradients=True)  # finds processes that have come apart
