from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import NonFiniteError
from gpuworker.engine.types import (
    AdamParams,
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
    OptimStepResult,
    SampleResult,
)

from .conftest import random_tokens
from .reference import make_adapter
from .sampling_requests import GREEDY, assert_same, finish, make_request, sample_one


def test_a_sampler_keeps_its_weights(engine: Engine) -> None:
    make_adapter(engine, "moving", LoraSpec(rank=4, seed=44))
    engine.keep_sampler("kept", "moving")
    request = make_request("kept", sampler_id="kept")
    expected = sample_one(engine, request).sequences[0]
    make_adapter(engine, "moving", LoraSpec(rank=4, seed=45))
    assert_same(sample_one(engine, request).sequences[0], expected)
    engine.sampler.submit(request)
    engine.sampler.step()
    engine.keep_sampler("kept", "moving")
    engine.drop_sampler("kept")
    assert not engine.has_sampler("kept")
    outcome = finish(engine.sampler)["kept"]
    assert isinstance(outcome, SampleResult)
    assert_same(outcome.sequences[0], expected)


def test_a_diverged_sampler_fails_alone(engine: Engine) -> None:
    expected = sample_one(engine, make_request("well", 8)).sequences[0]
    state = make_adapter(engine, "sick", LoraSpec(rank=4, seed=46))
    engine.load_sampler("sick", replace(state, weights=state.weights * math.nan))
    engine.sampler.submit(replace(make_request("sick", sampler_id="sick"), num_samples=3))
    engine.sampler.submit(make_request("well", 8))
    outcomes = finish(engine.sampler)
    assert isinstance(outcomes["sick"], NonFiniteError)
    assert isinstance(outcomes["well"], SampleResult)
    assert_same(outcomes["well"].sequences[0], expected)


def test_new_weights_are_sampled_from_without_a_copy_of_the_base_or_a_write(engine: Engine) -> None:
    """From an optimizer step to the first token: nothing of the size of a base weight, nothing on the disk."""
    make_adapter(engine, "fresh", LoraSpec(rank=4, seed=47))
    engine.keep_sampler("fresh", "fresh")
    request = make_request("fresh", sampler_id="fresh", params=replace(GREEDY, max_tokens=1))
    old = sample_one(engine, request).sequences[0]
    train(engine, "fresh")
    copies = BaseCopies(engine)
    with copies:
        written = num_written_bytes()
        (step,) = engine.optim_step([OptimStep(adapter_id="fresh", params=AdamParams(learning_rate=0.1))])
        engine.keep_sampler("fresh", "fresh")
        new = sample_one(engine, request).sequences[0]
        assert num_written_bytes() == written
    assert isinstance(step, OptimStepResult)
    assert new.logprobs[0] != old.logprobs[0]
    assert copies.num_reads > 10
    assert copies.found == []


def train(engine: Engine, adapter_id: str) -> None:
    tokens = random_tokens(np.random.default_rng(0), 12)
    weights = np.ones(len(tokens), dtype=np.float32)
    datum = Datum(tokens=tokens, target_tokens=tokens, inputs={"weights": weights})
    job = ForwardBackward(adapter_id=adapter_id, data=(datum,), loss_fn="cross_entropy")
    (outcome,) = engine.forward_backward([job])
    assert isinstance(outcome, ForwardBackwardResult)


def num_written_bytes() -> int:
    """Return how many bytes this process has handed to write calls, by whatever library."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


class BaseCopies(TorchDispatchMode):
    """Finds operators that read a base weight and leave new memory of at least its size."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        decoder = engine._base._decoder
        self._sizes = {p.untyped_storage().data_ptr(): p.numel() for p in decoder.parameters() if p.ndim > 1}
        self.num_reads = 0
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        read = [self._size(arg) for arg in args if isinstance(arg, torch.Tensor) and self._size(arg)]
        self.num_reads += len(read)
        made = [
            o
            for o in (output if isinstance(output, tuple | list) else [output])
            if isinstance(o, torch.Tensor)
        ]
        if read and any(not self._size(one) and one.numel() >= min(read) for one in made):
            self.found.append(str(func))
        return output

    def _size(self, tensor: torch.Tensor) -> int:
        if tensor.is_mkldnn:
            return tensor.numel()  # only frozen weights are held so
        return self._sizes.get(tensor.untyped_storage().data_ptr(), 0)
