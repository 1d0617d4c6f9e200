"""An operation that finds no room is tried once more, fails alone, and leaves what was there as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpuworker.engine.adapters import AdapterState
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import OutOfMemory
from gpuworker.engine.train_graphs import TrainGraphs
from gpuworker.engine.types import LoraSpec

from .jobs import make_job, results

SPEC, OTHER = LoraSpec(rank=2, seed=1), LoraSpec(rank=2, seed=2)
Operation = Callable[[Engine, AdapterState], None]


class _Full(TorchDispatchMode):
    """A device that has no room for some calls of one function: the allocator really refuses."""

    def __init__(self, name: str, refusals: int) -> None:
        super().__init__()
        self._name = name
        self._refusals = refusals

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == self._name and self._refusals:
            self._refusals -= 1
            torch.empty(2**50)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Case:
    """An operation, and the function in it that takes memory."""

    do: Operation
    name: str
    message: str


CASES = {
    "create": Case(lambda engine, _: engine.create_adapter("run", OTHER), "zeros", "the adapter"),
    "create in place": Case(lambda engine, _: engine.create_adapter("held", OTHER), "zeros", "the adapter"),
    "import": Case(
        lambda engine, state: engine.import_state("run", state, optimizer=True), "zeros", "the adapter"
    ),
    "import in place": Case(
        lambda engine, state: engine.import_state("held", state, optimizer=True), "_to_copy", "the state"
    ),
    "keep": Case(lambda engine, _: engine.keep_sampler("sampler", "held"), "clone", "the sampler's weights"),
    "load": Case(
        lambda engine, state: engine.load_sampler("sampler", state), "_to_copy", "the sampler's weights"
    ),
}


@pytest.fixture
def state(engine: Engine) -> AdapterState:
    """Return a state with a gradient; the engine holds an adapter that is another one."""
    engine.create_adapter("held", OTHER)
    engine.create_adapter("source", SPEC)
    source = engine._adapters.get("source")
    source.accumulate(torch.ones_like(source.master_P))
    made = engine.export_state("source", optimizer=True, gradients=True)
    for name in ("source", "run"):
        engine.drop_adapter(name)
    engine.drop_sampler("sampler")
    return made


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_what_finds_no_room_is_tried_again(case: Case, engine: Engine, state: AdapterState) -> None:
    with _Full(case.name, 1):
        case.do(engine, state)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_what_finds_no_room_then_either_changes_nothing(
    case: Case, engine: Engine, state: AdapterState
) -> None:
    held = engine._adapters.get("held")
    before = held.export(optimizer=True, gradients=True)
    with _Full(case.name, 2), pytest.raises(OutOfMemory, match=f"^no room for {case.message}: "):
        case.do(engine, state)
    assert not engine.has_adapter("run")
    assert not engine.has_sampler("sampler")
    assert engine._adapters.get("held") is held
    after = held.export(optimizer=True, gradients=True)
    assert torch.equal(after.weights, before.weights)
    assert after.gradient is None
    case.do(engine, state)


def test_what_training_keeps_for_later_passes_makes_room(
    model_directory: Callable[[str], Path],
) -> None:
    engine = Engine.load(model_directory("qwen3"), device="cpu", dtype="float32")
    graphs = TrainGraphs(engine._base, row_bytes=10_000, max_bytes=1 << 30)
    engine._trainer._graphs = graphs
    engine.create_adapter("held", SPEC)
    results(engine.forward_backward([make_job("held", np.random.default_rng(0), [20])]))
    assert graphs._passes
    with _Full("zeros", 1):
        engine.create_adapter("run", SPEC)
    assert not graphs._passes


def test_other_errors_are_not_taken_for_a_lack_of_memory(engine: Engine, state: AdapterState) -> None:
    class Broken(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise RuntimeError("broken")

    with Broken(), pytest.raises(RuntimeError, match="broken"):
        engine.create_adapter("run", SPEC)
