from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuworker.engine import optimizer
from gpuworker.engine.adapters import Adapter, Layout, ModuleShape
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import AdapterNotLoaded, EngineError, OutOfMemory
from gpuworker.engine.types import AdamParams, LoraSpec, OptimStep, OptimStepResult
from tests.torch_calls import TorchCalls

LAYOUT = Layout(3, (ModuleShape("layers.0.q_proj", 8, 6), ModuleShape("layers.0.k_proj", 8, 4)))


def make_adapter(*, seed: int = 1, dtype: torch.dtype = torch.float32) -> Adapter:
    adapter = Adapter(LoraSpec(rank=3, seed=seed), LAYOUT, device=torch.device("cpu"), dtype=dtype)
    adapter.initialize()
    return adapter


def step_all(*dues: tuple[Adapter, AdamParams]) -> list[OptimStepResult | EngineError]:
    """Take steps of these adapters together."""
    adapters = {str(number): adapter for number, (adapter, _) in enumerate(dues)}
    steps = [OptimStep(adapter_id=str(number), params=params) for number, (_, params) in enumerate(dues)]
    return optimizer.run(steps, adapters.__getitem__, free=lambda: None)


def step(adapter: Adapter, params: AdamParams) -> OptimStepResult:
    (outcome,) = step_all((adapter, params))
    assert isinstance(outcome, OptimStepResult)
    return outcome


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_it_matches_torch_adamw_over_changing_settings(clip: float, decay: float) -> None:
    adapter = make_adapter()
    parameter = torch.nn.Parameter(adapter.master_P.clone())
    reference = torch.optim.AdamW([parameter], fused=False, foreach=False)
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 8):
        params = AdamParams(
            learning_rate=0.01 * number,
            beta1=0.9 - 0.02 * number,
            beta2=0.95,
            eps=1e-8 * number,
            weight_decay=decay,
            grad_clip_norm=clip,
        )
        gradient = torch.randn(LAYOUT.num_parameters, generator=generator)
        adapter.accumulate(gradient.clone())
        result = step(adapter, params)
        parameter.grad = gradient
        reference.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=decay,
        )
        norm = gradient.norm().item()
        if clip > 0:
            torch.nn.utils.clip_grad_norm_([parameter], clip)
        reference.step()
        assert result.step == number
        assert result.grad_norm == pytest.approx(norm, rel=1e-6)
        torch.testing.assert_close(adapter.master_P, parameter.detach(), rtol=1e-5, atol=1e-7)
        assert adapter.gradient_P is None


@pytest.mark.parametrize("gradient", [None, torch.zeros(LAYOUT.num_parameters)])
def test_without_gradient_the_weights_keep_every_bit(gradient: torch.Tensor | None) -> None:
    adapter = make_adapter()
    adapter.accumulate(torch.ones(LAYOUT.num_parameters))
    step(adapter, AdamParams(learning_rate=0.1))
    before, momentum = adapter.master_P.clone(), adapter.exp_avg_P.clone()
    if gradient is not None:
        adapter.accumulate(gradient.clone())
    result = step(adapter, AdamParams(learning_rate=0.1))
    assert result == OptimStepResult(step=2, grad_norm=0.0, skipped=False)
    assert torch.equal(adapter.master_P, before)
    assert torch.equal(adapter.exp_avg_P, momentum * 0.9)


def test_weight_decay_acts_without_gradient() -> None:
    adapter = make_adapter()
    before = adapter.master_P.clone()
    step(adapter, AdamParams(learning_rate=0.1, weight_decay=0.5))
    torch.testing.assert_close(adapter.master_P, before * 0.95)


def test_a_tiny_gradient_is_not_taken_for_zero() -> None:
    """1e-30 squared is zero in float32."""
    adapter = make_adapter()
    before = adapter.master_P.clone()
    adapter.accumulate(torch.full((LAYOUT.num_parameters,), 1e-30))
    result = step(adapter, AdamParams(learning_rate=0.1, eps=1e-38))
    assert result.grad_norm > 0
    assert not torch.equal(adapter.master_P, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_dropped(value: float) -> None:
    adapter = make_adapter()
    adapter.accumulate(torch.ones(LAYOUT.num_parameters))
    step(adapter, AdamParams(learning_rate=0.1))
    kept = adapter.export(optimizer=True, gradients=True)
    bad = torch.ones(LAYOUT.num_parameters)
    bad[5] = value
    adapter.accumulate(bad)
    result = step(adapter, AdamParams(learning_rate=0.1, grad_clip_norm=1.0))
    assert result.skipped
    assert result.step == 1
    after = adapter.export(optimizer=True, gradients=True)
    assert after.gradient is None
    assert torch.equal(after.weights, kept.weights)
    assert kept.optimizer is not None
    assert after.optimizer is not None
    assert torch.equal(after.optimizer.exp_avg, kept.optimizer.exp_avg)


def test_step_counts_belong_to_adapters_and_unknown_ones_fail_alone(engine: Engine) -> None:
    engine.create_adapter("one", LoraSpec(rank=2, seed=1))
    engine.create_adapter("two", LoraSpec(rank=2, seed=2))
    step = OptimStep(adapter_id="one", params=AdamParams(learning_rate=0.1))
    outcomes = engine.optim_step(
        [step, step, replace(step, adapter_id="nobody"), replace(step, adapter_id="two")]
    )
    assert isinstance(outcomes[2], AdapterNotLoaded)
    assert [o.step for o in outcomes if isinstance(o, OptimStepResult)] == [1, 2, 1]


SAME = AdamParams(learning_rate=0.03, weight_decay=0.1)
PARAMS = [
    SAME,
    replace(SAME, grad_clip_norm=0.5),
    replace(SAME, learning_rate=0.01, beta1=0.8),
    SAME,  # gets no gradient
    replace(SAME, grad_clip_norm=1e6),
    SAME,  # gets one that is not finite
    replace(SAME, eps=1e-3, grad_clip_norm=0.1),
    SAME,  # gets one of zeros
]


def prepared(number: int, dtype: torch.dtype) -> Adapter:
    """Return an adapter with moments of a first step and the gradient of a second."""
    adapter = make_adapter(seed=number, dtype=dtype)
    generator = torch.Generator().manual_seed(number)
    adapter.accumulate(torch.randn(LAYOUT.num_parameters, generator=generator))
    step(adapter, SAME)
    if number == 3:
        return adapter
    gradient = torch.randn(LAYOUT.num_parameters, generator=generator)
    if number == 5:
        gradient[7] = math.nan
    adapter.accumulate(torch.zeros_like(gradient) if number == 7 else gradient)
    return adapter


def bytes_of(adapter: Adapter) -> tuple[int, list[bytes]]:
    assert adapter.gradient_P is None
    buffers = (adapter.master_P, adapter.exp_avg_P, adapter.exp_avg_sq_P, adapter.working_P)
    return adapter.step, [buffer.view(torch.uint8).numpy().tobytes() for buffer in buffers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_that_step_together_get_the_bytes_that_each_gets_alone(dtype: torch.dtype) -> None:
    alone = [prepared(number, dtype) for number in range(len(PARAMS))]
    expected = [step(adapter, params) for adapter, params in zip(alone, PARAMS, strict=True)]
    together = [prepared(number, dtype) for number in range(len(PARAMS))]
    found = step_all(*zip(together, PARAMS, strict=True))
    assert str(found) == str(expected)  # nan is not equal to itself
    assert [bytes_of(one) for one in together] == [bytes_of(one) for one in alone]
    assert [result.skipped for result in expected] == [number == 5 for number in range(len(PARAMS))]
    assert [result.step for result in expected] == [1 if number == 5 else 2 for number in range(len(PARAMS))]


def test_runs_that_step_together_are_one_call_for_each_set_of_hyperparameters() -> None:
    adapters = [prepared(number, torch.bfloat16) for number in range(len(PARAMS))]
    with TorchCalls() as calls:
        step_all(*zip(adapters, PARAMS, strict=True))
    assert calls.names.count("_fused_adamw_") == 3
    assert calls.names.count("stack") == 1
    assert calls.names.count("_foreach_copy_") == 1
    assert "_local_scalar_dense" not in calls.names  # what `.item()` asks for: a wait for the device


class _Cramped(torch.Tensor):
    """Weights on a device that has no room for what their step takes beside them: the allocator really refuses."""

    refusals = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.linalg.vector_norm and cls.refusals:
            cls.refusals -= 1
            torch.empty(2**50)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("refusals", [1, 2, 3])
def test_a_step_without_room_is_tried_again_and_fails_alone(
    refusals: int, model_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(model_directory("qwen3"), device="cpu", dtype="float32")
    names = ("first", "cramped", "last")
    for seed, name in enumerate(names):
        engine.create_adapter(name, LoraSpec(rank=2, seed=seed))
        held = engine._adapters.get(name)
        held.accumulate(torch.full_like(held.master_P, 0.5))
    cramped = engine._adapters.get("cramped")
    assert cramped.gradient_P is not None
    before = cramped.master_P.clone()
    monkeypatch.setattr(_Cramped, "refusals", refusals)
    cramped.gradient_P = cramped.gradient_P.as_subclass(_Cramped)
    params = AdamParams(learning_rate=0.1, grad_clip_norm=0.5)
    outcomes = engine.optim_step([OptimStep(adapter_id=name, params=params) for name in names])
    assert isinstance(outcomes[0], OptimStepResult)
    assert isinstance(outcomes[2], OptimStepResult)
    if refusals < 3:  # together, then alone, then alone with what was kept for later given back
        assert outcomes[1] == outcomes[0]
        assert not torch.equal(cramped.master_P, before)
        return
    assert isinstance(outcomes[1], OutOfMemory)
    assert str(outcomes[1]).startswith("no room for this optim_step: ")
    assert torch.equal(cramped.master_P, before)
    assert cramped.gradient_P is not None
    assert cramped.step == 0
    (again,) = engine.optim_step([OptimStep(adapter_id="cramped", params=params)])
    assert again == outcomes[0]
