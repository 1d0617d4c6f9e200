"""Activations of a CPU whose bits for a row do not depend on how many rows there are.

torch shares the elements of a tensor out among its threads and computes those that do not fill a vector at the
end of a share in another way, with other last bits. Where shares end follows from the number of rows, so here
they are made to end between vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

_VECTORS: Final = 64
"""Two vectors of half precision, the most that one turn of torch's loops takes."""


class Kernel(NamedTuple):
    """An operator of single elements, the last of its operands being the output, and how many shares it makes."""

    run: Callable[..., object]
    num_shares: Callable[[int], int]


def _shares(num_elements: int) -> int:
    """Source: pytorch/pytorch: aten/src/ATen/TensorIterator.h -> GRAIN_SIZE."""
    return min(torch.get_num_threads(), -(-num_elements // 32_768))


def _shares_of_gelu(num_elements: int) -> int:
    """Source: pytorch/pytorch: aten/src/ATen/native/cpu/Activation.cpp -> GeluKernelImpl."""
    return torch.get_num_threads() if num_elements > 16_384 else 1


def _gelu(approximate: str) -> tuple[Kernel, Kernel]:
    run, back = torch.ops.aten.gelu.out, torch.ops.aten.gelu_backward.grad_input
    return (
        Kernel(lambda own, out: run(own, approximate=approximate, out=out), _shares_of_gelu),
        Kernel(lambda grad, own, out: back(grad, own, approximate=approximate, grad_input=out), _shares),
    )


def _silu() -> tuple[Kernel, Kernel]:
    run, back = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input
    return (
        Kernel(lambda own, out: run(own, out=out), _shares),
        Kernel(lambda grad, own, out: back(grad, own, grad_input=out), _shares),
    )


_KERNELS: Final[dict[type[nn.Module], tuple[Kernel, Kernel]]] = {
    SiLUActivation: _silu(),
    nn.SiLU: _silu(),
    GELUActivation: _gelu("none"),
    GELUTanh: _gelu("tanh"),
}
"""Forward and backward of the activations of the models that can be trained here."""


class SteadyActivation(nn.Module):
    """A model's activation with every share of a thread made of whole vectors."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.kernels = _KERNELS[type(plain)]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the activation of every element."""
        output: Tensor = _Activation.apply(inputs, self.kernels)  # type: ignore[no-untyped-call]
        return output


def steady(model: nn.Module) -> None:
    """Replace the activations of a model that are not the same in every part of a vector; all others stay."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module) in _KERNELS:
                setattr(parent, name, SteadyActivation(module))


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, kernels: tuple[Kernel, Kernel]) -> Tensor:
        forward, ctx.backward_kernel = kernels
        ctx.save_for_backward(inputs)
        return _by_shares(forward, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _by_shares(ctx.backward_kernel, grad, *ctx.saved_tensors), None


def _by_shares(kernel: Kernel, *operands: Tensor) -> Tensor:
    """Return what a kernel makes of operands of one shape, whole vectors first."""
    flat = [operand.contiguous().view(-1) for operand in operands]
    output = torch.empty_like(flat[0])
    middle = _whole(len(output), kernel.num_shares)
    for part in (slice(middle), slice(middle, None)):
        if len(output[part]):
            kernel.run(*(one[part] for one in flat), output[part])
    return output.view(operands[0].shape)


def _whole(num_elements: int, num_shares: Callable[[int], int]) -> int:
    """Return how many elements can be shared out with no vector cut; what is left is less than one share."""
    rest = num_elements % (_VECTORS * max(num_shares(num_elements), 1))
    return _whole(num_elements - rest, num_shares) if rest else num_elements
