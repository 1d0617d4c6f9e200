"""RMS norms in one kernel each, for a CUDA device.

transformers computes them in some eight, with a copy of the rows in float32.
Axes: T rows of the batch, D features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class FusedNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis, computed in float32 and rounded once."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = float(norm.variance_epsilon)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Return the normed rows, of the same shape and dtype."""
        return functional.rms_norm(hidden_TD, self.weight.shape, self.weight, self.eps)


def fuse(model: nn.Module) -> None:
    """Replace the plain RMS norms of a model; others, such as Gemma's with `1 + weight`, stay as they are."""
    plain = [(name, module) for name, module in model.named_modules() if _is_plain(module)]
    for name, module in plain:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, FusedNorm(module))


def _is_plain(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
