from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from gpuworker.engine import norms

from .conftest import CONFIGS


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_model_with_fused_norms_gives_the_same_logits(architecture: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.normal_(parameter)
    fused = copy.deepcopy(model)
    norms.fuse(fused)
    num_fused = sum(isinstance(module, norms.FusedNorm) for module in fused.modules())
    assert (num_fused > 0) is not architecture.startswith("gemma")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(fused(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_fused_norm_rounds_half_precision_once() -> None:
    norm = nn.RMSNorm(64, eps=1e-6)
    norm.variance_epsilon = 1e-6  # type: ignore[assignment]
    nn.init.normal_(norm.weight)
    hidden_TD = torch.randn(5, 64)
    half = copy.deepcopy(norm).to(torch.bfloat16)
    expected = norm(hidden_TD)
    actual = norms.FusedNorm(half)(hidden_TD.to(torch.bfloat16)).float()
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_norm_hands_back_the_gradient_of_a_plain_one(dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(64, eps=1e-3)
    norm.variance_epsilon = 1e-3  # type: ignore[assignment]
    nn.init.normal_(norm.weight).requires_grad_(False)
    wide, grad = torch.randn(2, 5, 64)
    wide.requires_grad_()
    (expected,) = torch.autograd.grad(norm(wide), wide, grad)
    own = wide.detach().to(dtype).requires_grad_()
    fused = norms.FusedNorm(copy.deepcopy(norm).to(dtype))
    (actual,) = torch.autograd.grad(fused(own), own, grad.to(dtype))
    assert actual.dtype == dtype
    assert (actual.float() - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()
