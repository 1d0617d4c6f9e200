"""Adapters of any rank and module set side by side with their gradients, in buffers that stay where they are.

What is recorded reads and writes these; before and after, the jobs' own flat buffers are copied in one kernel each.
Axes: K places of the bank, R its rank, P parameters of one place, N parameters that an adapter has of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from gpuworker.engine.adapters import UNEMBED, Layout, ModuleShape
from gpuworker.engine.lora_stack import AdapterRows

_INDEX_BYTES: Final = torch.int64.itemsize


class TrainingBank:
    """`num_places` adapters of at most `rank`, and behind them one of zeros for rows without an adapter.

    The head's projection is not in it: its products belong to the head.
    """

    def __init__(
        self,
        modules: Sequence[ModuleShape],
        *,
        num_places: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.layout = _bank_layout(modules, rank)
        shape = (num_places + 1, self.layout.num_parameters)
        self.num_places = num_places
        self.weights_KP = torch.zeros(shape, device=device, dtype=dtype)
        self.gradients_KP = torch.zeros(shape, device=device)
        self.pairs = self.layout.views(self.weights_KP)
        self.gradients = self.layout.views(self.gradients_KP)
        self._indices: dict[Layout, Tensor] = {}

    @staticmethod
    def num_bytes(modules: Sequence[ModuleShape], *, num_places: int, rank: int, dtype: torch.dtype) -> int:
        """Return what a bank of this size takes, with the index of one layout."""
        num_parameters = _bank_layout(modules, rank).num_parameters
        return num_parameters * ((num_places + 1) * (dtype.itemsize + torch.float32.itemsize) + _INDEX_BYTES)

    def put(self, place: int, part: AdapterRows) -> None:
        """Copy the weights that a job trains to a place."""
        weights_P, own_P = self.weights_KP[place], part.adapter.working_P
        index_N = self._index(part.adapter.layout)
        if len(index_N) < len(weights_P):
            weights_P.zero_()
        weights_P.index_copy_(0, index_N, own_P[: len(index_N)])

    def hand_over(self, place: int, part: AdapterRows) -> None:
        """Add the gradient of a place to that of the job."""
        if part.gradient_P is not None:
            index_N = self._index(part.adapter.layout)
            part.gradient_P[: len(index_N)].add_(self.gradients_KP[place].index_select(0, index_N))

    def _index(self, layout: Layout) -> Tensor:
        """Return where each parameter of an adapter, up to its head, lies in a place of the bank, (N,)."""
        if layout not in self._indices:
            places = self.layout.views(torch.arange(self.layout.num_parameters))
            rank, parts = layout.rank, [torch.empty(0, dtype=torch.int64)]
            for module in layout.modules:
                if module.projection != UNEMBED:
                    a_RD, b_FR = places[module.name]
                    parts += [a_RD[:rank].flatten(), b_FR[:, :rank].flatten()]
            self._indices[layout] = torch.cat(parts).to(self.weights_KP.device)
        return self._indices[layout]


def _bank_layout(modules: Sequence[ModuleShape], rank: int) -> Layout:
    return Layout(rank, tuple(module for module in modules if module.projection != UNEMBED))
