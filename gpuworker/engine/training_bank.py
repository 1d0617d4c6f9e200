"""Adapters of any rank and module set side by side with their gradients, in buffers that stay where they are.

What is recorded reads and writes these; before and after, the jobs' own flat buffers are copied, factors of like layers at once.
Axes: K places of the bank, Q its numbers, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpuworker.engine.adapters import UNEMBED, Layout, ModuleShape
from gpuworker.engine.bank_layout import BankLayout
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
        self._held: list[Layout] = []

    @staticmethod
    def num_bytes(
        groups: Sequence[Sequence[ModuleShape]], *, num_places: int, rank: int, dtype: torch.dtype
    ) -> int:
        """Return what a bank of this size takes."""
        num_parameters = BankLayout.size(_without_head(groups), num_places=num_places, rank=rank)
        return num_parameters * (dtype.itemsize + torch.float32.itemsize)

    def put(self, parts: Sequence[AdapterRows]) -> None:
        """Copy the weights that jobs train to the first places; the others hold zeros."""
        layouts = [part.adapter.layout for part in parts]
        if layouts != self._held:
            self.weights_Q.zero_()
            self._held = layouts
        for place, part in enumerate(parts):
            for stretch in self.layout.stretches(part.adapter.layout):
                stretch.of_bank(self.weights_Q, place).copy_(stretch.of_adapter(part.adapter.working_P))

    def hand_over(self, parts: Sequence[AdapterRows]) -> None:
        """Add the gradient of each place to that of its job."""
        for place, part in enumerate(parts):
            if part.gradient_P is not None:
                for stretch in self.layout.stretches(part.adapter.layout):
                    stretch.of_adapter(part.gradient_P).add_(stretch.of_bank(self.gradients_Q, place))


def _without_head(groups: Sequence[Sequence[ModuleShape]]) -> list[Sequence[ModuleShape]]:
    return [group for group in groups if group[0].projection != UNEMBED]
