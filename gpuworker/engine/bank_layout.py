"""Where the factors of adapters lie that are put side by side, so that one product serves all of them.

The A of all adapters and of all layers that read the same rows are one matrix, and so are the B of all adapters
of one layer.
Axes: K places, R rank of a place, C = K * R columns, M layers of a group, D input and F output features,
Q numbers of the bank, N parameters that an adapter has of one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from gpuworker.engine.adapters import Layout, LoraPair, LoraWeights, ModuleShape

ALIGNMENT: Final = 8
"""Products want rows of a multiple of 16 bytes, which is 8 numbers in bfloat16."""
INDEX_BYTES: Final = 2 * torch.int64.itemsize + torch.int32.itemsize
"""What the indices of an adapter take for each parameter, those of another place made of them included."""


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

    def indices(self, layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return where the parameters of an adapter lie at place 0, (N,), and how far from there at the next.

        Without those of projections that the bank does not have; they are the last of an adapter.
        """
        first, step = [_empty(device)], [_empty(device)]
        for module in layout.modules:
            if module.name in self._starts:
                start_a, start_b = self._starts[module.name]
                size = layout.rank * module.in_features
                first.append(torch.arange(start_a, start_a + size, device=device))
                step.append(torch.full((size,), self.rank * module.in_features, device=device))
                rows_F1 = torch.arange(module.out_features, device=device)[:, None] * self.num_columns
                first.append((start_b + rows_F1 + torch.arange(layout.rank, device=device)).flatten())
                step.append(torch.full((module.out_features * layout.rank,), self.rank, device=device))
        return torch.cat(first), torch.cat(step).int()


def fitting_rank(wanted: Sequence[LoraWeights]) -> int:
    """Return the smallest rank of a bank that holds these adapters."""
    ranks = [len(next(iter(weights.pairs.values())).a) for weights in wanted if weights.pairs]
    return -(-max(ranks, default=1) // ALIGNMENT) * ALIGNMENT


def _names(group: Sequence[ModuleShape]) -> tuple[str, ...]:
    return tuple(module.name for module in group)


def _empty(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=device)
