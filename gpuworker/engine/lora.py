"""The routed linear layer: one frozen projection whose rows belong to different adapters.

Rows of one adapter are adjacent (a segment). Adapter gradients are written straight into the
job's flat buffer, so autograd carries activations only.
Axes: T rows of the packed batch, D input features, F output features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpuworker.engine.adapters import LoraPair, LoraWeights

MIN_ROWS = 16
"""Below 12 rows a float32 matmul on a CPU picks other kernels, and a row's bits would depend on
how many rows its neighbours bring."""


class Segment(NamedTuple):
    """Adjacent rows of one job; `gradients` is None where no gradient is wanted."""

    start: int
    stop: int
    weights: LoraWeights
    gradients: Mapping[str, LoraPair] | None


class Attention(Protocol):
    """How the sequences of the current batch attend; one call per layer."""

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor: ...


class Route:
    """What the batch now in the model looks like; shared by all routed layers of one model.

    `sampled_rows` is set while sampling, None in training. Only so many rows then go through the
    frozen products, and adapter products run over windows of MIN_ROWS rows, since the number of
    rows of one adapter depends on its neighbours.
    """

    def __init__(self) -> None:
        self.segments: Sequence[Segment] = ()
        self.attention: Attention | None = None
        self.sampled_rows: int | None = None

    def clear(self) -> None:
        """Let go of the batch."""
        self.segments = ()
        self.attention = None


class RoutedLinear(nn.Module):
    """A frozen linear layer plus the LoRA products of the segments that train it."""

    def __init__(self, base: nn.Linear, name: str, route: Route) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.name = name
        self.route = route
        self.anchor = torch.zeros((), device=base.weight.device, requires_grad=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's output.

        Shapes:
            inputs: (1, T, D); returns (1, T, F).
        """
        rows_TD = inputs.reshape(-1, inputs.shape[-1])
        segments = [segment for segment in self.route.segments if self.name in segment.weights.pairs]
        if torch.is_grad_enabled():
            # The anchor makes the output require a gradient where the input does not: below the
            # first adapter nothing is then recorded.
            trained = any(segment.gradients is not None for segment in segments)
            output_TF: Tensor = _RoutedProduct.apply(
                rows_TD, self.anchor if trained else None, self, segments
            )  # type: ignore[no-untyped-call]
        elif self.route.sampled_rows is not None:
            output_TF = rows_TD.new_zeros(len(rows_TD), self.weight.shape[0])
            output_TF[: self.route.sampled_rows] = self.base_product(rows_TD[: self.route.sampled_rows])
            for segment in segments:
                add_windowed(output_TF, rows_TD, segment, self.name)
        else:
            output_TF = self.base_product(rows_TD)
            for segment in segments:
                add_product(output_TF, rows_TD, segment, self.name)
        return output_TF.view(*inputs.shape[:-1], -1)

    def base_product(self, rows_TD: Tensor) -> Tensor:
        """Return the frozen part, of shape (T, F)."""
        return functional.linear(rows_TD, self.weight, self.bias)


def add_product(output_TF: Tensor, rows_TD: Tensor, segment: Segment, name: str) -> Tensor:
    """Add one segment's LoRA product in place and return the inner product of shape (rows, R)."""
    pair, scaling = segment.weights.pairs[name], segment.weights.scaling
    inner_TR = rows_TD[segment.start : segment.stop].mm(pair.a.t())
    add_matmul(output_TF[segment.start : segment.stop], inner_TR, pair.b.t(), scaling)
    return inner_TR


def add_windowed(output_TF: Tensor, rows_TD: Tensor, segment: Segment, name: str) -> None:
    """Add one segment's LoRA product in place, over at least MIN_ROWS rows of the batch.

    The rows of the window outside the segment are computed and dropped; a batch always has
    MIN_ROWS rows.
    """
    start, stop, weights, _ = segment
    pair = weights.pairs[name]
    first = max(0, min(start, rows_TD.shape[0] - MIN_ROWS))
    last = max(stop, first + MIN_ROWS)
    product_WF = rows_TD[first:last].mm(pair.a.t()).mm(pair.b.t())
    output_TF[start:stop].add_(product_WF[start - first : stop - first], alpha=weights.scaling)


def add_matmul(target: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """Add `alpha * left @ right` to `target` in place, also where `target` has a wider dtype."""
    if target.dtype == left.dtype:
        target.addmm_(left, right, alpha=alpha)
    else:
        target.add_(left.mm(right), alpha=alpha)


class _RoutedProduct(torch.autograd.Function):
    """Base product plus LoRA products; backward fills the segments' gradient views."""

    @staticmethod
    def forward(
        ctx: Any, rows_TD: Tensor, anchor: Tensor | None, layer: RoutedLinear, segments: list[Segment]
    ) -> Tensor:
        output_TF = layer.base_product(rows_TD)
        inner = [add_product(output_TF, rows_TD, segment, layer.name) for segment in segments]
        ctx.save_for_backward(rows_TD)
        ctx.layer, ctx.segments, ctx.inner = layer, segments, inner
        return output_TF

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, None, None, None]:
        (rows_TD,) = ctx.saved_tensors
        layer: RoutedLinear = ctx.layer
        grad_rows_TD = grad_TF.mm(layer.weight) if ctx.needs_input_grad[0] else None
        for segment, inner_TR in zip(ctx.segments, ctx.inner, strict=True):
            part = slice(segment.start, segment.stop)
            grad_inner_TR = backward_pair(
                segment, layer.name, grad_TF[part], inner_TR=inner_TR, rows_TD=rows_TD[part]
            )
            if grad_rows_TD is not None:
                grad_rows_TD[part].addmm_(grad_inner_TR, segment.weights.pairs[layer.name].a)
        ctx.layer = ctx.segments = ctx.inner = None
        return grad_rows_TD, None, None, None


def backward_pair(
    segment: Segment, name: str, grad_TF: Tensor, *, inner_TR: Tensor, rows_TD: Tensor
) -> Tensor:
    """Add the gradients of A and B to the segment's views and return that of the inner product.

    Shapes:
        all arguments hold the segment's own rows; returns (rows, R), already scaled.
    """
    pair, scaling = segment.weights.pairs[name], segment.weights.scaling
    grad_inner_TR = grad_TF.mm(pair.b).mul_(scaling)
    if segment.gradients is not None:
        gradient = segment.gradients[name]
        add_matmul(gradient.a, grad_inner_TR.t(), rows_TD, 1.0)
        add_matmul(gradient.b, grad_TF.t(), inner_TR, scaling)
    return grad_inner_TR
