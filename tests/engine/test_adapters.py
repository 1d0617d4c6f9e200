from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gpuworker.engine.adapters import AdapterState
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import AdapterNotLoaded, CheckpointError, LoraSpecError
from gpuworker.engine.types import LoraSpec

SPEC = LoraSpec(rank=4, seed=99)


def export(engine: Engine, adapter_id: str) -> AdapterState:
    return engine.export_state(adapter_id, optimizer=True, gradients=True)


def test_first_weights_follow_the_seed(engine: Engine) -> None:
    for name, spec in (("seed-a", SPEC), ("seed-b", SPEC), ("seed-c", replace(SPEC, seed=100))):
        engine.create_adapter(name, spec)
    first, same, other = (export(engine, f"seed-{letter}") for letter in "abc")
    assert torch.equal(first.weights, same.weights)
    assert not torch.equal(first.weights, other.weights)
    for name, pair in first.layout.views(first.weights).items():
        bound = pair.a.shape[1] ** -0.5
        assert not pair.b.any(), name
        assert 0.5 * bound < pair.a.abs().max() <= bound


def test_seeds_of_any_size_work(engine: Engine) -> None:
    for seed in (-1, 0, 2**63, 2**80):
        engine.create_adapter("seeds", replace(SPEC, seed=seed))
    assert engine.has_adapter("seeds")


@pytest.mark.parametrize(
    ("attn", "mlp", "unembed", "expected"),
    [
        (True, False, False, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (False, True, False, {"gate_proj", "up_proj", "down_proj"}),
        (False, False, True, {"lm_head"}),
    ],
)
def test_flags_choose_the_modules(
    engine: Engine, attn: bool, mlp: bool, unembed: bool, expected: set[str]
) -> None:
    spec = LoraSpec(rank=2, seed=1, train_attn=attn, train_mlp=mlp, train_unembed=unembed)
    engine.create_adapter("flags", spec)
    layout = export(engine, "flags").layout
    assert {module.projection for module in layout.modules} == expected
    assert len(layout.modules) == (1 if unembed else 2 * len(expected))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(SPEC, rank=0), "rank 0 is outside 1..64"),
        (replace(SPEC, rank=65), "rank 65 is outside 1..64"),
        (replace(SPEC, alpha=0.0), "alpha"),
        (replace(SPEC, train_attn=False, train_mlp=False, train_unembed=False), "at least one"),
    ],
)
def test_it_refuses_impossible_adapters(engine: Engine, spec: LoraSpec, message: str) -> None:
    with pytest.raises(LoraSpecError, match=message):
        engine.create_adapter("impossible", spec)
    assert not engine.has_adapter("impossible")


def test_import_refuses_what_does_not_fit_and_changes_nothing(
    engine: Engine, load_engine: Callable[..., Engine]
) -> None:
    engine.create_adapter("fits", SPEC)
    before = export(engine, "fits")
    engine.create_adapter("odd", replace(SPEC, rank=5))
    engine.create_adapter("less", replace(SPEC, train_mlp=False))
    wrong = [export(engine, "odd"), export(engine, "less"), replace(before, weights=before.weights[:-1])]
    wrong.append(replace(before, weights=before.weights.double()))
    wrong.append(replace(before, gradient=before.weights[1:]))
    for state in wrong:
        with pytest.raises(CheckpointError):
            engine.import_state("fits", state, optimizer=False)
    with pytest.raises(CheckpointError, match="weights only"):
        engine.import_state("fits", replace(before, optimizer=None), optimizer=True)
    assert torch.equal(export(engine, "fits").weights, before.weights)
    with pytest.raises(CheckpointError):
        engine.import_state("new", replace(before, spec=replace(SPEC, rank=999)), optimizer=False)
    assert not engine.has_adapter("new")


def test_unknown_and_dropped_adapters_are_not_loaded(engine: Engine) -> None:
    engine.create_adapter("gone", SPEC)
    engine.drop_adapter("gone")
    engine.drop_adapter("gone")
    with pytest.raises(AdapterNotLoaded, match="gone"):
        export(engine, "gone")
    with pytest.raises(AdapterNotLoaded):
        engine.keep_sampler("s", "gone")
