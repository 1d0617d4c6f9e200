"""Adapters side by side for decoding on a CPU: one batched product for all of them in the place of one for each.

A product of a few rows there costs what its call costs. Only adapters of one rank and with the same modules share
a stack: padding would change bits. That a row has the bits it has alone is tried out before any stack is used.
Axes: G adapters, W rows of each, T rows of the batch, D input and F output features, R rank.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gpuworker.engine.adapters import LoraPair, LoraWeights

_MAX_BYTES = 256 << 20
_COUNTS = (4, 8, 12, 16)

Kind: TypeAlias = tuple[int, tuple[str, ...]]


class Stack(NamedTuple):
    """Factors (G, R, D) and (G, F, R) by module; scaling is alpha / rank of each, (G, 1, 1)."""

    pairs: Mapping[str, LoraPair]
    scaling_G11: Tensor


class StackedRows:
    """The products of adjacent rows, so many of each adapter of a stack."""

    def __init__(self, stack: Stack, start: int, counts: Sequence[int], *, row_step: int) -> None:
        self._stack = stack
        self._own = slice(start, start + sum(counts))
        width = -(-max(counts) // row_step) * row_step
        taken: list[int] = []
        kept: list[int] = []
        for number, count in enumerate(counts):
            first = start + sum(counts[:number])
            taken += [first + min(row, count - 1) for row in range(width)]
            kept += range(number * width, number * width + count)
        self._taken, self._kept = torch.tensor(taken), torch.tensor(kept)
        self._shared_rows: Tensor | None = None
        self._rows_GWD = torch.empty(0)

    def add(self, output_TF: Tensor, rows_TD: Tensor, name: str) -> None:
        """Add the LoRA products of one projection in place."""
        pair = self._stack.pairs.get(name)
        if pair is None:
            return
        inner_GWR = torch.bmm(self._windows(rows_TD), pair.a.transpose(1, 2)).mul_(self._stack.scaling_G11)
        product_GWF = torch.bmm(inner_GWR, pair.b.transpose(1, 2))
        output_TF[self._own].add_(product_GWF.flatten(0, 1).index_select(0, self._kept))

    def _windows(self, rows_TD: Tensor) -> Tensor:
        """Return each adapter's rows, filled up with copies of the last; siblings read the same rows."""
        if rows_TD is not self._shared_rows:
            self._shared_rows = rows_TD
            taken = rows_TD.index_select(0, self._taken)
            self._rows_GWD = taken.view(len(self._stack.scaling_G11), -1, rows_TD.shape[1])
        return self._rows_GWD


class DecodeStacks:
    """The stacks of the batches decoded last; a stack is made when its adapters meet for the first time.

    Attributes:
        inexact: shapes of factors that are not put into stacks.
    """

    def __init__(self) -> None:
        self.inexact: set[torch.Size] = set()
        self._held: OrderedDict[tuple[int, ...], tuple[Stack, Sequence[LoraWeights]]] = OrderedDict()

    def find(self, weights: Sequence[LoraWeights]) -> Stack | None:
        """Return the stack of adapters of one kind in this order; None where each has to go by itself."""
        key = tuple(map(id, weights))
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][0]
        shapes = {factor.shape for pair in weights[0].pairs.values() for factor in pair}
        if _num_bytes(weights) > _MAX_BYTES or shapes & self.inexact:
            return None
        stack = _stacked(weights)
        self._held[key] = stack, tuple(weights)  # which keeps the ids from being given to others
        while sum(_num_bytes(held) for _, held in self._held.values()) > _MAX_BYTES:
            self._held.popitem(last=False)
        return stack

    def clear(self) -> None:
        """Let go of all stacks."""
        self._held.clear()


def kind_of(weights: LoraWeights) -> Kind:
    """Return what adapters must have in common to share a stack: the rank and the modules."""
    return len(next(iter(weights.pairs.values())).a), tuple(weights.pairs)


@torch.no_grad()
def is_exact(factor_FD: Tensor) -> bool:
    """Return whether stacks with factors of this shape give a row the bits of the adapter's own products.

    Which kernels torch's products use is a property of the machine's libraries, so it is tried out on random
    likenesses.
    """
    generator = torch.Generator().manual_seed(0)
    factors_GFD = torch.randn(3, *factor_FD.shape, generator=generator).to(factor_FD)
    rows = torch.randn(max(_COUNTS), factor_FD.shape[1], generator=generator).to(factor_FD)
    own_FD = factors_GFD[1].clone()
    for count in _COUNTS:
        alone = rows[:count].clone().mm(own_FD.t())
        together = rows[:count].expand(3, -1, -1).contiguous()
        for chosen in (slice(1, 2), slice(0, 2), slice(0, 3)):
            product = torch.bmm(together[chosen], factors_GFD[chosen].transpose(1, 2))
            if not torch.equal(product[1 - chosen.start], alone):
                return False
    return True


def _stacked(weights: Sequence[LoraWeights]) -> Stack:
    names = weights[0].pairs
    pairs = {
        name: LoraPair(
            torch.stack([one.pairs[name].a for one in weights]),
            torch.stack([one.pairs[name].b for one in weights]),
        )
        for name in names
    }
    return Stack(pairs, torch.tensor([one.scaling for one in weights])[:, None, None])


def _num_bytes(weights: Sequence[LoraWeights]) -> int:
    numbers = sum(factor.numel() for pair in weights[0].pairs.values() for factor in pair)
    return len(weights) * numbers * next(iter(weights[0].pairs.values())).a.itemsize
