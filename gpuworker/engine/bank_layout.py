"""Where the factors of adapters lie that are put side by side, so that one product serves all of them.

The A of all adapters and of all layers that read the same rows are one matrix, and so are the B of all adapters
of one layer.
Axes: K places, R rank of a place, C = K * R columns, M layers of a group, D input and F output features,
P parameters of one adapter, Q numbers of the bank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from gpuworker.engine.adapters import Layout, LoraPair, LoraWeights, ModuleShape

ALIGNMENT: Final = 8
"""Products want rows of a multiple of 16 bytes, which is 8 numbers in bfloat16."""


class Columns(NamedTuple):
    """The factors of all places as plain matrices.

    Shapes:
        a: (M * C, D) for the names of each group; b: (F, C) for each name.
    """

    a: Mapping[tuple[str, ...], Tensor]
    b: Mapping[str, Tensor]


class BankLayout:
    """The order of `num_places` adapters of one rank in a flat buffer.

    Args:
        groups: the projections, those together that read the same rows.
    """

    def __init__(self, groups: Sequence[Sequence[ModuleShape]], *, num_places: int, rank: int) -> None:
        self.groups = groups
        self.num_places = num_places
        self.rank = rank
        self.num_columns = num_places * rank
        self._starts: dict[str, tuple[int, int]] = {}
        self._stretches: dict[Layout, list[Stretch]] = {}
        start = 0
        for group in groups:
            for module in group:
                self._starts[module.name] = start, 0
                start += self.num_columns * module.in_features
        for module in self._modules:
            self._starts[module.name] = self._starts[module.name][0], start
            start += self.num_columns * module.out_features
        self.num_parameters = start

    @staticmethod
    def size(groups: Sequence[Sequence[ModuleShape]], *, num_places: int, rank: int) -> int:
        """Return Q of such a layout."""
        widths = (module.in_features + module.out_features for group in groups for module in group)
        return num_places * rank * sum(widths)

    @property
    def _modules(self) -> list[ModuleShape]:
        return [module for group in self.groups for module in group]

    def columns(self, flat_Q: Tensor) -> Columns:
        """Return the matrices as views."""
        a, b = {}, {}
        for group in self.groups:
            start, width = self._starts[group[0].name][0], group[0].in_features
            size = len(group) * self.num_columns * width
            a[_names(group)] = flat_Q[start : start + size].view(-1, width)
        for module in self._modules:
            start = self._starts[module.name][1]
            size = self.num_columns * module.out_features
            b[module.name] = flat_Q[start : start + size].view(module.out_features, self.num_columns)
        return Columns(a, b)

    def pairs(self, flat_Q: Tensor) -> dict[str, LoraPair]:
        """Return the factors of every module by place as views, (K, R, D) and (K, F, R)."""
        columns, pairs = self.columns(flat_Q), {}
        for group in self.groups:
            for module, a_CD in zip(
                group, torch.split(columns.a[_names(group)], self.num_columns), strict=True
            ):
                b_FKR = columns.b[module.name].view(module.out_features, self.num_places, self.rank)
                a_KRD = a_CD.view(self.num_places, self.rank, module.in_features)
                pairs[module.name] = LoraPair(a_KRD, b_FKR.transpose(0, 1))
        return pairs

    def stretches(self, layout: Layout) -> list[Stretch]:
        """Return where the factors of an adapter lie in its own buffer and at place 0, those of like layers together."""
        if layout not in self._stretches:
            self._stretches[layout] = _joined(self._factors(layout))
        return self._stretches[layout]

    def whole(self) -> list[Stretch]:
        """Return the stretches of a place with all of its columns."""
        return self.stretches(Layout(self.rank, tuple(self._modules)))

    def column_places(self, device: torch.device) -> Tensor:
        """Return the place that each column belongs to, (C,)."""
        return torch.arange(self.num_columns, device=device) // self.rank

    def _factors(self, layout: Layout) -> list[Stretch]:
        """Return each factor of an adapter by itself."""
        found: list[Stretch] = []
        start = 0
        for module in layout.modules:
            size_a, size_b = layout.rank * module.in_features, layout.rank * module.out_features
            if module.name in self._starts:
                start_a, start_b = self._starts[module.name]
                width, columns, rank = module.in_features, self.num_columns, layout.rank
                shape_a, shape_b = (rank, width), (module.out_features, rank)
                step_a = self.rank * width
                kind = module.projection
                a = Stretch(kind, False, shape_a, (width, 1), (width, 1), step_a, start, start_a)
                b = Stretch(kind, True, shape_b, (rank, 1), (columns, 1), self.rank, start + size_a, start_b)
                found += [a, b]
            start += size_a + size_b
        return found


@dataclass(frozen=True)
class Stretch:
    """One factor, or those of one projection in several layers, in an adapter's flat buffer and in the bank's.

    `place_step` is how far it is from one place of the bank to the next, the other steps how far to the next layer.
    """

    projection: str
    is_b: bool
    shape: tuple[int, int]
    adapter_strides: tuple[int, int]
    bank_strides: tuple[int, int]
    place_step: int
    adapter_start: int
    bank_start: int
    count: int = 1
    adapter_step: int = 0
    bank_step: int = 0

    def of_adapter(self, flat_P: Tensor) -> Tensor:
        """Return the factors as a view of an adapter's buffer, (count, ...)."""
        strides = (self.adapter_step, *self.adapter_strides)
        return flat_P.as_strided(
            (self.count, *self.shape), strides, flat_P.storage_offset() + self.adapter_start
        )

    def of_bank(self, flat_Q: Tensor, place: int) -> Tensor:
        """Return the factors as a view of a place of the bank, (count, ...)."""
        strides = (self.bank_step, *self.bank_strides)
        start = flat_Q.storage_offset() + self.bank_start + place * self.place_step
        return flat_Q.as_strided((self.count, *self.shape), strides, start)

    @property
    def kind(self) -> tuple[object, ...]:
        """Return what factors have in common that can be one stretch."""
        return self.projection, self.is_b, self.shape, self.place_step

    def joined(self, other: Stretch) -> Stretch | None:
        """Return both as one, where the other lies as far behind the last factor as that behind the one before it."""
        last = self.count - 1
        adapter_step = other.adapter_start - self.adapter_start - last * self.adapter_step
        bank_step = other.bank_start - self.bank_start - last * self.bank_step
        if last and (adapter_step, bank_step) != (self.adapter_step, self.bank_step):
            return None
        return replace(self, count=self.count + 1, adapter_step=adapter_step, bank_step=bank_step)


def _joined(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Join each factor with those of its kind before it; of like layers all come together."""
    joined: list[Stretch] = []
    newest: dict[tuple[object, ...], int] = {}
    for stretch in stretches:
        number = newest.get(stretch.kind)
        both = None if number is None else joined[number].joined(stretch)
        if number is None or both is None:
            newest[stretch.kind] = len(joined)
            joined.append(stretch)
        else:
            joined[number] = both
    return joined


def fitting_rank(wanted: Sequence[LoraWeights]) -> int:
    """Return the smallest rank of a bank that holds these adapters."""
    ranks = [len(next(iter(weights.pairs.values())).a) for weights in wanted if weights.pairs]
    return -(-max(ranks, default=1) // ALIGNMENT) * ALIGNMENT


def _names(group: Sequence[ModuleShape]) -> tuple[str, ...]:
    return tuple(module.name for module in group)
