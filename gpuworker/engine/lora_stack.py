"""LoRA products of many adapters of one layout in a few grouped kernels, for a CUDA device.

There a launch costs more than the arithmetic of a short segment, and every segment takes its own in
every projection. So the adapters of adjacent rows are put side by side once a batch, and one grouped
product then serves all of them.
Axes: G adapters, N their rows, T rows of the batch, D input and F output features, R rank, P parameters
of one adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from gpuworker.engine.adapters import WHOLE, Adapter, LoraPair
from gpuworker.engine.bank_layout import ALIGNMENT
from gpuworker.engine.lora import Products, Segment

_MAX_BYTES = 1 << 30
"""What copies and gradients of stacked adapters may take; larger ones keep the device busy on their own."""


class AdapterRows(NamedTuple):
    """Adjacent rows of one job with the flat buffers behind them; `gradient_P` is None where none is wanted."""

    segment: Segment
    adapter: Adapter
    gradient_P: Tensor | None


class GroupedProducts:
    """The products of adapters that lie side by side; `gradients` is None where none is wanted.

    Shapes:
        pairs, gradients: (G, R, D) and (G, F, R) each; ends_G: int32, where each adapter's rows end, counted
            from the first of `rows`; scaling_N1: alpha / rank of each row.
    """

    def __init__(
        self,
        pairs: Mapping[str, LoraPair],
        gradients: Mapping[str, LoraPair] | None,
        *,
        rows: slice,
        ends_G: Tensor,
        scaling_N1: Tensor,
    ) -> None:
        self.names = pairs
        self._pairs = pairs
        self._gradients = gradients
        self._rows = rows
        self._ends_G = ends_G
        self._scaling_N1 = scaling_N1

    @property
    def is_trained(self) -> bool:
        """Return whether gradients are wanted."""
        return self._gradients is not None

    def add(self, outputs: Mapping[str, Tensor], rows_TD: Tensor) -> dict[str, Tensor]:
        """Add the products in place; return their scaled inner products, (N, R) each."""
        inner = {}
        for name in filter(self._pairs.__contains__, outputs):
            pair = self._pairs[name]
            inner_NR = self._product(rows_TD[self._rows], pair.a.transpose(1, 2)).mul_(self._scaling_N1)
            outputs[name][self._rows].add_(self._product(inner_NR, pair.b.transpose(1, 2)))
            inner[name] = inner_NR
        return inner

    def backward(
        self,
        grads: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        *,
        rows_TD: Tensor,
        grad_rows_TD: Tensor | None,
    ) -> None:
        """Keep the gradients of A and B; add that of the input rows in place where it is wanted."""
        for name, inner_NR in kept.items():
            pair, grad_NF = self._pairs[name], grads[name][self._rows]
            grad_inner_NR = self._product(grad_NF, pair.b).mul_(self._scaling_N1)
            if self._gradients is not None:
                gradient = self._gradients[name]
                gradient.a.add_(self._product(grad_inner_NR.t(), rows_TD[self._rows]))
                gradient.b.add_(self._product(grad_NF.t(), inner_NR))
            if grad_rows_TD is not None:
                grad_rows_TD[self._rows].add_(self._product(grad_inner_NR, pair.a))

    def finish(self) -> None:
        """Nothing is handed over: the gradients are where the caller wanted them."""

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply every adapter's rows: (N, .) by (G, ., .), or (., N) by (N, .), which gives (G, ., .)."""
        return grouped_mm(left, right, offs=self._ends_G)


class Stack(GroupedProducts):
    """Adjacent rows of several jobs whose adapters have one layout."""

    def __init__(self, rows: Sequence[AdapterRows]) -> None:
        layout, is_trained = rows[0].adapter.layout, rows[0].gradient_P is not None
        flat_GP = torch.stack([some.adapter.working_P for some in rows])
        counts = torch.tensor([some.segment.stop - some.segment.start for some in rows])
        scalings = torch.tensor([some.adapter.weights.scaling for some in rows])
        self._jobs = rows
        self._gradient_GP = torch.zeros(flat_GP.shape if is_trained else 0, device=flat_GP.device)
        super().__init__(
            layout.views(flat_GP),
            layout.views(self._gradient_GP) if is_trained else None,
            rows=slice(rows[0].segment.start, rows[-1].segment.stop),
            ends_G=counts.cumsum(0).to(flat_GP.device, torch.int32),
            scaling_N1=scalings.repeat_interleave(counts)[:, None].to(flat_GP.device),
        )

    def finish(self) -> None:
        """Hand the gradients over to the jobs; once, after the backward pass."""
        for job, gradient_P in zip(self._jobs, self._gradient_GP, strict=False):
            if job.gradient_P is not None:
                job.gradient_P.add_(gradient_P)


def combine(rows: Sequence[AdapterRows]) -> list[Products]:
    """Return the products of a batch, stacked where the device gains by it."""
    products: list[Products] = []
    for _, group in groupby(rows, key=lambda some: some.adapter.layout):
        same = list(group)
        if _gains(same):
            products.append(Stack(same))
        else:
            products += [some.segment for some in same]
    return products


def _gains(rows: Sequence[AdapterRows]) -> bool:
    """Return whether the device has grouped kernels for these adapters, and more launches than work."""
    working_P, layout = rows[0].adapter.working_P, rows[0].adapter.layout
    num_bytes = len(rows) * layout.num_parameters * (torch.float32.itemsize + working_P.itemsize)
    is_served = working_P.is_cuda and working_P.dtype == torch.bfloat16 and layout.rank % ALIGNMENT == 0
    return is_served and layout.share == WHOLE and len(rows) > 1 and num_bytes <= _MAX_BYTES
