"""Adapters of any rank side by side for sampling, where a launch costs more than the arithmetic of a few rows.

As in `lora_columns`, every row goes through all of them and keeps what is its own.
Axes: T rows, K places of the bank, R rank, C = K * R columns, M layers of a group, D input and F output features,
P parameters of one adapter, Q numbers of the bank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpuworker.engine.adapters import LoraWeights, ModuleShape
from gpuworker.engine.bank_layout import BankLayout
from gpuworker.engine.lora import RoutedLinear
from gpuworker.engine.lora_columns import columns_of
from gpuworker.engine.products import add_matmul


class AdapterBank:
    """`num_places` adapters of at most `rank`, their alpha / rank within B."""

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
        self.rank = rank
        self.num_places = num_places
        self.num_columns = layout.num_columns
        self._layout = layout
        self._flat_Q = torch.zeros(layout.num_parameters, device=device, dtype=dtype)
        self.pairs = layout.pairs(self._flat_Q)
        self.columns = layout.columns(self._flat_Q)
        self._column_places_C = layout.column_places(device)
        self._held: list[LoraWeights | None] = [None] * num_places
        self._ill: set[int] = set()

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

    def is_ill(self, weights: LoraWeights) -> bool:
        """Return whether an adapter was found to have numbers that are not finite; zeros are in its place."""
        return any(self._held[place] is weights for place in self._ill)

    def foreign(self, places_T: Tensor) -> Tensor:
        """Return which columns belong to other adapters than those at the rows' places, bool (T, C)."""
        return self._column_places_C != places_T[:, None]

    def _put(self, place: int, weights: LoraWeights) -> None:
        views, before = weights.pairs, self._held[place]
        self._held[place] = weights
        self._ill.discard(place)
        if before is not None and before.pairs.layout != views.layout:
            for stretch in self._layout.whole():
                stretch.of_bank(self._flat_Q, place).zero_()
        # Zero times what is not finite would reach the rows of all adapters.
        is_ill = not torch.isfinite(views.flat_P.abs().amax() * max(1.0, weights.scaling))
        if is_ill:
            self._ill.add(place)
        for stretch in self._layout.stretches(views.layout):
            bank = stretch.of_bank(self._flat_Q, place)
            if is_ill:
                bank.zero_()
            else:
                torch.mul(
                    stretch.of_adapter(views.flat_P), weights.scaling if stretch.is_b else 1.0, out=bank
                )


class BankedProducts:
    """How the routed layers compute rows whose adapters are in a bank: all at once, and each row keeps what is its own.

    Shapes:
        places_T: where each row's adapter is, `num_places` for rows without one.
    """

    def __init__(self, bank: AdapterBank, places_T: Tensor) -> None:
        self._bank = bank
        self._foreign_T1C = bank.foreign(places_T)[:, None]
        self._inputs: Tensor | None = None
        self._inner: dict[str, Tensor] = {}

    def __call__(self, layer: RoutedLinear, inputs: Tensor) -> Tensor:
        """Return a layer's output; inputs: (1, T, D); returns (1, T, F)."""
        if inputs is not self._inputs:  # the very same for all layers of a group
            group = tuple(one.name for one in layer.group)
            self._inputs, self._inner = inputs, self._inner_of(group, inputs[0])
        output_TF = layer.base_product(inputs[0])
        self._add(output_TF, self._inner[layer.name], layer.name)
        return output_TF[None]

    def add(self, output_TF: Tensor, rows_TD: Tensor, name: str) -> None:
        """Add the LoRA products of one projection that shares its rows with no other, in place."""
        self._add(output_TF, self._inner_of((name,), rows_TD)[name], name)

    def _inner_of(self, group: tuple[str, ...], rows_TD: Tensor) -> dict[str, Tensor]:
        """Return the rows' products with the A of their own adapters by layer, zero in all other columns, (T, C)."""
        inner_TMC = columns_of(rows_TD, self._bank.columns.a[group], len(group))
        inner_TMC.masked_fill_(self._foreign_T1C, 0.0)
        return dict(zip(group, inner_TMC.unbind(1), strict=True))

    def _add(self, output_TF: Tensor, inner_TC: Tensor, name: str) -> None:
        add_matmul(output_TF, inner_TC, self._bank.columns.b[name].t(), 1.0)
