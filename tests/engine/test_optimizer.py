from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpuworker.engine import optimizer
from gpuworker.engine.adapters import Adapter, Layout, ModuleShape
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import AdapterNotLoaded
from gpuworker.engine.types import AdamParams, LoraSpec, OptimStep, OptimStepResult

LAYOUT = Layout(3, (ModuleShape("layers.0.q_proj", 8, 6), ModuleShape("layers.0.k_proj", 8, 4)))


def make_adapter() -> Adapter:
    adapter = Adapter(LoraSpec(rank=3, seed=1), LAYOUT, device=torch.device("cpu"), dtype=torch.float32)
    adapter.initialize()
    return adapter


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
        result = optimizer.step(adapter, params)
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
    optimizer.step(adapter, AdamParams(learning_rate=0.1))
    before, momentum = adapter.master_P.clone(), adapter.exp_avg_P.clone()
    if gradient is not None:
        adapter.accumulate(gradient.clone())
    result = optimizer.step(adapter, AdamParams(learning_rate=0.1))
    assert result == OptimStepResult(step=2, grad_norm=0.0, skipped=False)
    assert torch.equal(adapter.master_P, before)
    assert torch.equal(adapter.exp_avg_P, momentum * 0.9)


def test_weight_decay_acts_without_gradient() -> None:
    adapter = make_adapter()
    before = adapter.master_P.clone()
    optimizer.step(adapter, AdamParams(learning_rate=0.1, weight_decay=0.5))
    torch.testing.assert_close(adapter.master_P, before * 0.95)


def test_a_tiny_gradient_is_not_taken_for_zero() -> None:
    """1e-30 squared is zero in float32."""
    adapter = make_adapter()
    before = adapter.master_P.clone()
    adapter.accumulate(torch.full((LAYOUT.num_parameters,), 1e-30))
    result = optimizer.step(adapter, AdamParams(learning_rate=0.1, eps=1e-38))
    assert result.grad_norm > 0
    assert not torch.equal(adapter.master_P, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_dropped(value: float) -> None:
    adapter = make_adapter()
    adapter.accumulate(torch.ones(LAYOUT.num_parameters))
    optimizer.step(adapter, AdamParams(learning_rate=0.1))
    kept = adapter.export(optimizer=True, gradients=True)
    bad = torch.ones(LAYOUT.num_parameters)
    bad[5] = value
    adapter.accumulate(bad)
    result = optimizer.step(adapter, AdamParams(learning_rate=0.1, grad_clip_norm=1.0))
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
