"""Activations: the numbers of transformers, and the same bits for a row whatever the number of rows and threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from gpuworker.engine.activations import SteadyActivation, steady

from .conftest import CONFIGS

NAMES = ("silu", "swish", "gelu", "gelu_pytorch_tanh")
NUM_ROWS, WIDTH = 512, 1408


def both_ways(activation: nn.Module, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return an activation and the gradient of its input."""
    inputs = rows.clone().requires_grad_()
    output = activation(inputs)
    (gradient,) = torch.autograd.grad(output, inputs, grad.clone())
    return output.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_it_gives_what_transformers_gives(name: str, dtype: torch.dtype) -> None:
    rows, grad = torch.randn(2, 37, 65).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    expected = both_ways(ACT2FN[name], rows, grad)
    torch.testing.assert_close(
        both_ways(SteadyActivation(ACT2FN[name]), rows, grad), expected, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_same_bits_in_every_batch(
    name: str, num_threads: int, set_threads: Callable[[int], None]
) -> None:
    activation = SteadyActivation(ACT2FN[name])
    rows, grad = torch.randn(2, NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    set_threads(1)
    expected = both_ways(activation, rows, grad)
    set_threads(num_threads)
    for count in (8, 16, 40, 64, 72, 120, 360, NUM_ROWS):
        for whole, part in zip(expected, both_ways(activation, rows[:count], grad[:count]), strict=True):
            assert torch.equal(part, whole[:count]), count


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architectures_activations_are_replaced(architecture: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        steady(model)
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    assert sum(isinstance(one, SteadyActivation) for one in model.modules()) == model.config.num_hidden_layers
