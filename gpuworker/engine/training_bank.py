"""Adapters of any rank and module set side by side with their gradients, in buffers that stay where they are.

What is recorded reads and writes these; before and after, the jobs' own flat buffers are copied in one kernel each.
Axes: K places of the bank, Q its numbers, N parameters that an adapter has of one place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpuworker.engine.adapters import UNEMBED, Layout, ModuleShape
from gpuworker.engine.bank_layout import INDEX_BYTES, BankLayout
from gpuworker.engine.lora_stack import AdapterRows


class TrainingBank:
    """`num_places` adapters of at most `rank`, without the head's projection: its products belong to the head."""

    def __init__(
        self,
        groups: Sequence[Sequence[ModuleShape]],
        *,
        num_places: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.layout = BankLayout(_without_head(groups), num_places=num_places, rank=rank)
        self.weights_Q = torch.zeros(self.layout.num_parameters, device=device, dtype=dtype)
        self.gradients_Q = torch.zeros(self.layout.num_parameters, device=device)
        self._indices: dict[Layout, tuple[Tensor, Tensor]] = {}
        self._held: list[Layout] = []

    @staticmethod
    def num_bytes(
        groups: Sequence[Sequence[ModuleShape]], *, num_places: int, rank: int, dtype: torch.dtype
    ) -> int:
        """Return what a bank of this size takes, with the index of one layout."""
        num_parameters = BankLayout.size(_without_head(groups), num_places=num_places, rank=rank)
        index_bytes = num_parameters // num_places * INDEX_BYTES
        return num_parameters * (dtype.itemsize + torch.float32.itemsize) + index_bytes

    def put(self, parts: Sequence[AdapterRows]) -> None:
        """Copy the weights that jobs train to the first places; the others hold zeros."""
        layouts = [part.adapter.layout for part in parts]
        if layouts != self._held:
            self.weights_Q.zero_()
            self._held = layouts
        for place, part in enumerate(parts):
            index_N = self._index(part.adapter.layout, place)
            self.weights_Q.index_copy_(0, index_N, part.adapter.working_P[: len(index_N)])

    def hand_over(self, parts: Sequence[AdapterRows]) -> None:
        """Add the gradient of each place to that of its job."""
        for place, part in enumerate(parts):
            if part.gradient_P is not None:
                index_N = self._index(part.adapter.layout, place)
                part.gradient_P[: len(index_N)].add_(self.gradients_Q.index_select(0, index_N))

    def _index(self, layout: Layout, place: int) -> Tensor:
        """Return where each parameter of an adapter, up to its head, lies in the bank, (N,)."""
        if layout not in self._indices:
            self._indices[layout] = self.layout.indices(layout, self.weights_Q.device)
        first_N, step_N = self._indices[layout]
        return torch.add(first_N, step_N, alpha=place) if place else first_N


def _without_head(groups: Sequence[Sequence[ModuleShape]]) -> list[Sequence[ModuleShape]]:
    return [group for group in groups if group[0].projection != UNEMBED]
