"""The products of a sampling batch: frozen weights, then each adapter on its own few rows.

A batch is padded to a multiple of `row_step` rows, and so is what each adapter's product runs over:
how many rows an adapter has depends on its neighbours, and a row's bits must not.
Axes: T rows of the batch, W rows of one window, D input features, F output features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gpuworker.engine.adapters import LoraWeights
from gpuworker.engine.decode_stack import DecodeStacks, StackedRows, kind_of
from gpuworker.engine.lora import RoutedLinear
from gpuworker.engine.row_probe import find_row_step


class SampledRows(NamedTuple):
    """Adjacent rows that sample from the same weights."""

    start: int
    stop: int
    weights: LoraWeights


class _Part(Protocol):
    """The LoRA products of some adjacent rows."""

    def add(self, output_TF: Tensor, rows_TD: Tensor, name: str) -> None: ...


class SampledProducts:
    """How the routed layers of the model compute while sampling.

    Args:
        stacks: takes the adapters of a batch together; None where each goes by itself.
    """

    def __init__(
        self,
        segments: Sequence[SampledRows],
        num_rows: int,
        *,
        row_step: int,
        stacks: DecodeStacks | None = None,
    ) -> None:
        self._inputs: Tensor | None = None
        self._rows_TD = torch.empty(0)
        self._parts: list[_Part] = []
        for _, group in groupby(segments, key=lambda segment: kind_of(segment.weights)):
            same = list(group)
            stack = (
                stacks.find([one.weights for one in same]) if stacks is not None and len(same) > 1 else None
            )
            if stack is not None:
                counts = [segment.stop - segment.start for segment in same]
                self._parts.append(StackedRows(stack, same[0].start, counts, row_step=row_step))
            else:
                self._parts += [_Window.around(segment, num_rows, row_step) for segment in same]

    def __call__(self, layer: RoutedLinear, inputs: Tensor) -> Tensor:
        """Return a layer's output.

        Shapes:
            inputs: (1, T, D); returns (1, T, F).
        """
        if inputs is not self._inputs:
            self._inputs, self._rows_TD = inputs, inputs[0]  # the very same for all layers that read it
        output_TF = layer.base_product(self._rows_TD)
        self.add(output_TF, self._rows_TD, layer.name)
        if layer.add_up_output is not None:
            layer.add_up_output(output_TF)
        return output_TF[None]

    def add(self, output_TF: Tensor, rows_TD: Tensor, name: str) -> None:
        """Add the LoRA products of one projection in place."""
        for part in self._parts:
            part.add(output_TF, rows_TD, name)


def find_factor_step(factors: Iterable[Tensor]) -> int:
    """Return the row step that products with factors of these shapes need, whatever their values."""
    generator = torch.Generator().manual_seed(0)
    likenesses = [torch.randn(factor.shape, generator=generator).to(factor) for factor in factors]
    return find_row_step(likenesses, lambda rows, factor: rows.mm(factor.t()))


class _Window(NamedTuple):
    """The rows one adapter's product runs over, its own among them, and those within the window."""

    rows: slice
    own: slice
    kept: slice
    weights: LoraWeights

    @classmethod
    def around(cls, segment: SampledRows, num_rows: int, row_step: int) -> _Window:
        start, stop, weights = segment
        size = -(-(stop - start) // row_step) * row_step
        first = min(start, num_rows - size)
        return cls(
            slice(first, first + size), slice(start, stop), slice(start - first, stop - first), weights
        )

    def add(self, output_TF: Tensor, rows_TD: Tensor, name: str) -> None:
        pair = self.weights.pairs.get(name)
        if pair is not None:
            inner_WR = rows_TD[self.rows].mm(pair.a.t()).mul_(self.weights.scaling)
            output_TF[self.own].add_(inner_WR.mm(pair.b.t())[self.kept])
