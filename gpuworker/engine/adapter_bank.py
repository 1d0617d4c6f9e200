"""Adapters of any rank side by side for decoding, where a launch costs more than the arithmetic of a few rows.

As in `lora_columns`, every row goes through all of them and keeps what is its own.
Axes: S rows, K places of the bank, R rank, C = K * R columns, M layers of a group, D input and F output features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpuworker.engine.adapters import LoraWeights, ModuleShape
from gpuworker.engine.bank_layout import BankLayout
from gpuworker.engine.lora_columns import columns_of
from gpuworker.engine.products import add_matmul


class AdapterBank:
    """`num_places` adapters of at most `rank`, their alpha / rank within B.

    All that it holds is finite, as decoding begins with a prompt whose logits were: so nothing of another adapter reaches
    a row.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[ModuleShape]],
        *,
        num_places: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        layout = BankLayout(groups, num_places=num_places, rank=rank)
        flat_Q = torch.zeros(layout.num_parameters, device=device, dtype=dtype)
        self.rank = rank
        self.num_places = num_places
        self.pairs = layout.pairs(flat_Q)
        self._columns = layout.columns(flat_Q)
        self._column_places_C = torch.arange(layout.num_columns, device=device) // rank
        self._held: list[LoraWeights | None] = [None] * num_places

    @staticmethod
    def num_bytes(
        groups: Sequence[Sequence[ModuleShape]], *, num_places: int, rank: int, dtype: torch.dtype
    ) -> int:
        """Return what a bank of this size takes."""
        return BankLayout.size(groups, num_places=num_places, rank=rank) * dtype.itemsize

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

    def foreign(self, places_S: Tensor) -> Tensor:
        """Return which columns belong to other adapters than those at the rows' places, bool (S, C)."""
        return self._column_places_C != places_S[:, None]

    def inner(self, group: tuple[str, ...], rows_SD: Tensor, foreign_SC: Tensor) -> Tensor:
        """Return the rows' products with the A of their own adapters, zero in all other columns, (S, M, C)."""
        inner_SMC = columns_of(rows_SD, self._columns.a[group], len(group))
        return inner_SMC.masked_fill_(foreign_SC[:, None], 0.0)

    def add(self, output_SF: Tensor, inner_SC: Tensor, name: str) -> None:
        """Add the products of one layer in place."""
        add_matmul(output_SF, inner_SC, self._columns.b[name].t(), 1.0)

    def _put(self, place: int, weights: LoraWeights) -> None:
        self._held[place] = weights
        for name, (a_KRD, b_KFR) in self.pairs.items():
            a_KRD[place].zero_()
            b_KFR[place].zero_()
            if name in weights.pairs:
                a_rD, b_Fr = weights.pairs[name]
                a_KRD[place, : len(a_rD)] = a_rD
                b_KFR[place, :, : len(a_rD)] = b_Fr * weights.scaling
