"""Adapters of any rank side by side, so that one grouped product serves rows of all of them.

For decoding on a CUDA device, where a launch costs more than the arithmetic of a few rows.
Axes: S rows, K places of the bank, D input and F output features, R rank of the bank, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gpuworker.engine.adapters import Layout, LoraWeights, ModuleShape

ALIGNMENT = 8
"""Grouped kernels want rows of a multiple of 16 bytes, which is 8 numbers in bfloat16."""


class AdapterBank:
    """`num_places` adapters of at most `rank`, and behind them one of zeros for rows without an adapter."""

    def __init__(
        self,
        modules: tuple[ModuleShape, ...],
        *,
        num_places: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        layout = Layout(rank, modules)
        flat_KP = torch.zeros(num_places + 1, layout.num_parameters, device=device, dtype=dtype)
        self.rank = rank
        self.num_places = num_places
        self.pairs = layout.views(flat_KP)
        self._held: list[LoraWeights | None] = [None] * num_places

    @staticmethod
    def num_bytes(modules: tuple[ModuleShape, ...], *, num_places: int, rank: int, dtype: torch.dtype) -> int:
        """Return what a bank of this size takes."""
        return (num_places + 1) * Layout(rank, modules).num_parameters * dtype.itemsize

    def places(self, wanted: Sequence[LoraWeights]) -> dict[int, int]:
        """Return the place of each adapter by its `id`; those that are missing take places of unwanted ones."""
        places = {id(held): place for place, held in enumerate(self._held) if held is not None}
        keep = {id(weights) for weights in wanted}
        free = [place for place, held in enumerate(self._held) if id(held) not in keep]
        for weights in wanted:
            if id(weights) not in places:
                place = free.pop()
                self._put(place, weights)
                places[id(weights)] = place
        return places

    def scaling(self, place: int) -> float:
        """Return alpha / rank of the adapter at a place, 0 where there is none."""
        held = self._held[place] if place < self.num_places else None
        return 0.0 if held is None else held.scaling

    def add(
        self, output_SF: Tensor, rows_SD: Tensor, name: str, *, ends_K: Tensor, scaling_S1: Tensor
    ) -> None:
        """Add every row's LoRA product in place.

        Args:
            ends_K: int32, (K,): rows are sorted by place, and those of place k end before `ends_K[k]`.
        """
        a_KRD, b_KFR = self.pairs[name]
        inner_SR = functional.grouped_mm(rows_SD, a_KRD.transpose(1, 2), offs=ends_K).mul_(scaling_S1)
        output_SF.add_(functional.grouped_mm(inner_SR, b_KFR.transpose(1, 2), offs=ends_K))

    def _put(self, place: int, weights: LoraWeights) -> None:
        self._held[place] = weights
        for name, (a_KRD, b_KFR) in self.pairs.items():
            a_KRD[place].zero_()
            b_KFR[place].zero_()
            if name in weights.pairs:
                a_rD, b_Fr = weights.pairs[name]
                a_KRD[place, : len(a_rD)] = a_rD
                b_KFR[place, :, : len(a_rD)] = b_Fr


def fitting_rank(wanted: Sequence[LoraWeights]) -> int:
    """Return the smallest rank of a bank that holds these adapters."""
    ranks = [len(pair.a) for weights in wanted for pair in list(weights.pairs.values())[:1]]
    return -(-max(ranks, default=1) // ALIGNMENT) * ALIGNMENT
