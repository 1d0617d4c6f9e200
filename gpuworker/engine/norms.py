"""RMS norms in few steps: one kernel on a CUDA device, one step of autograd on a CPU.

transformers computes them in some eight, with a copy of the rows in float32.
Axes: T rows of the batch, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class FusedNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis, computed in float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = float(norm.variance_epsilon)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Return the normed rows, of the same shape and dtype."""
        if hidden_TD.is_cuda:
            return functional.rms_norm(hidden_TD, self.weight.shape, self.weight, self.eps)
        normed_TD: Tensor = _RmsNorm.apply(hidden_TD, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normed_TD


def fuse(model: nn.Module) -> None:
    """Replace the plain RMS norms of a model; others, such as Gemma's with `1 + weight`, stay as they are."""
    plain = [(name, module) for name, module in model.named_modules() if _is_plain(module)]
    for name, module in plain:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, FusedNorm(module))


def _is_plain(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


class _RmsNorm(torch.autograd.Function):
    """The norm with a frozen weight; only its input gets a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide_TD = hidden_TD.float()
        length_T1 = torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True)
        scale_T1: Tensor = length_T1.square_().div_(hidden_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden_TD, weight_D, scale_T1)
        return (wide_TD * scale_T1).to(hidden_TD.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        hidden_TD, weight_D, scale_T1 = ctx.saved_tensors
        wide_TD = hidden_TD.float()
        inner_TD = (grad_TD * weight_D).float()
        along_T1 = torch.linalg.vecdot(inner_TD, wide_TD).unsqueeze(-1)
        along_T1.mul_(scale_T1.pow(3)).div_(-hidden_TD.shape[-1])
        return inner_TD.mul_(scale_T1).addcmul_(wide_TD, along_T1).to(hidden_TD.dtype), None, None
