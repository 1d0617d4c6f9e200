"""One batch through the decoder and back: the plain way, kernel by kernel.

`train_graphs` has the other one, which records both directions.
Axes: T rows of the packed batch, D hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gpuworker.engine.attention import PackedAttention
from gpuworker.engine.base_model import BaseModel
from gpuworker.engine.batching import PackedRows
from gpuworker.engine.lora_stack import AdapterRows, combine


class Pass(Protocol):
    """What a training batch needs of the decoder; one `forward`, then at most one `backward`.

    `mixes` says whether numbers of one job that are not finite may reach the other jobs.
    """

    @property
    def mixes(self) -> bool: ...

    def forward(self) -> Tensor:
        """Return the last hidden states (T, D), without a gradient of their own."""
        ...

    def zero_gradient(self) -> Tensor:
        """Return zeros (T, D) for the gradient of these hidden states."""
        ...

    def backward(self) -> None:
        """Send that gradient back and add the adapters' gradients to those of the jobs."""
        ...


class PlainPass:
    """Launches every kernel of a batch by itself, whatever its size."""

    mixes = False

    def __init__(self, base: BaseModel, rows: PackedRows, parts: Sequence[AdapterRows]) -> None:
        self._base = base
        self._rows = rows
        self._products = combine(parts)
        self._attend = PackedAttention(rows.lengths, device=base.device)

    def forward(self) -> Tensor:
        """Return the last hidden states (T, D)."""
        is_trained = any(some.is_trained for some in self._products)
        with torch.set_grad_enabled(is_trained), self._base.routed(self._products, self._attend):
            self._hidden_TD = self._base.hidden(self._rows)
        return self._hidden_TD.detach()

    def zero_gradient(self) -> Tensor:
        """Return zeros (T, D)."""
        self._gradient_TD = torch.zeros_like(self._hidden_TD, requires_grad=False)
        return self._gradient_TD

    def backward(self) -> None:
        """Add the adapters' gradients to those of the jobs; nothing where only the head is trained."""
        if self._hidden_TD.requires_grad:
            torch.autograd.backward(self._hidden_TD, self._gradient_TD)
        for some in self._products:
            some.finish()
