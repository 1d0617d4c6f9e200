"""The routed linear layer: one frozen projection whose rows belong to different adapters.

Rows of one adapter are adjacent (a segment). Adapter gradients are written straight into the
job's flat buffer, so autograd carries activations only.
Axes: T rows of the packed batch, D input features, F output features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gpuworker.engine.adapters import LoraPair, LoraWeights
from gpuworker.engine.products import FrozenWeight, add_factor_gradient, add_matmul, factor_product


class Products(Protocol):
    """The LoRA products of some adjacent rows of a training batch, for the modules in `names`.

    Outputs and their gradients come by name for all layers that read the same rows.
    """

    @property
    def names(self) -> Container[str]: ...

    @property
    def is_trained(self) -> bool: ...

    def add(self, outputs: Mapping[str, Tensor], rows_TD: Tensor) -> Any:
        """Add the products to the outputs (T, F) in place; return what `backward` wants of them."""
        ...

    def backward(
        self, grads: Mapping[str, Tensor], kept: Any, *, rows_TD: Tensor, grad_rows_TD: Tensor | None
    ) -> None:
        """Keep the gradients of A and B; add that of the input rows in place where it is wanted."""
        ...

    def finish(self) -> None:
        """Hand over what `backward` kept; once, after the backward pass."""
        ...


class Segment(NamedTuple):
    """Adjacent rows of one job; `gradients` is None where no gradient is wanted."""

    start: int
    stop: int
    weights: LoraWeights
    gradients: Mapping[str, LoraPair] | None

    @property
    def names(self) -> Container[str]:
        """Return the modules that the adapter changes."""
        return self.weights.pairs

    @property
    def is_trained(self) -> bool:
        """Return whether a gradient is wanted."""
        return self.gradients is not None

    def add(self, outputs: Mapping[str, Tensor], rows_TD: Tensor) -> dict[str, Tensor]:
        """Add the segment's LoRA products in place and return their inner products, (rows, R) each."""
        (pairs, scaling), inner = self.weights, {}
        own_TD = rows_TD[self.start : self.stop]
        for name, output_TF in outputs.items():
            if name in pairs:
                pair = pairs[name]
                inner[name] = factor_product(own_TD, pair.a)
                add_matmul(output_TF[self.start : self.stop], inner[name], pair.b.t(), scaling)
        return inner

    def backward(
        self,
        grads: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        *,
        rows_TD: Tensor,
        grad_rows_TD: Tensor | None,
    ) -> None:
        """Add the gradients of A and B to the segment's views, and that of the input rows in place."""
        part = slice(self.start, self.stop)
        own_TD = rows_TD[part]
        own_grad_TD = None if grad_rows_TD is None else grad_rows_TD[part]
        for name, inner_TR in kept.items():
            grad_inner_TR = backward_pair(self, name, grads[name][part], inner_TR=inner_TR, rows_TD=own_TD)
            if own_grad_TD is not None:
                pair = self.weights.pairs[name]
                own_grad_TD.addmm_(grad_inner_TR, pair.a, alpha=self.weights.scaling)

    def finish(self) -> None:
        """Nothing is left to hand over: the gradients are the job's own views."""


class Scoring(NamedTuple):
    """What a layer makes of the products of queries and keys.

    Args:
        scaling: they are multiplied by it.
        window: a row sees so many keys, its own included; all of them where it is None.
        softcap: they come between minus and plus this, where it is not None.
    """

    scaling: float
    window: int | None
    softcap: float | None


class Attention(Protocol):
    """How the sequences of the current batch attend; one call per layer."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor: ...


class SampledProduct(Protocol):
    """How layers compute the rows of a sampling batch; `add` adds the LoRA products of the head in place."""

    def __call__(self, layer: RoutedLinear, inputs: Tensor) -> Tensor: ...

    def add(self, output_TF: Tensor, rows_TD: Tensor, name: str) -> None: ...


class Route:
    """What the batch now in the model looks like; shared by all routed layers of one model.

    `sampled` computes the layers while sampling; None in training.
    """

    def __init__(self) -> None:
        self.products: Sequence[Products] = ()
        self.attention: Attention | None = None
        self.sampled: SampledProduct | None = None
        self._shared_input: Tensor | None = None
        self._outputs: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Let go of the batch."""
        self.products = ()
        self.attention = None
        self.sampled = None
        self._let_go_of_outputs()

    def take(self, layer: RoutedLinear, inputs: Tensor) -> Tensor:
        """Return a layer's output; the first layer of a group computes those of all its siblings.

        A layer that gets another input than its siblings did is never given their product.
        """
        if inputs is not self._shared_input or layer.name not in self._outputs:
            self._shared_input, self._outputs = inputs, _group_product(layer.group, inputs, self.products)
        output = self._outputs.pop(layer.name)
        if not self._outputs:
            self._let_go_of_outputs()
        return output

    def _let_go_of_outputs(self) -> None:
        self._shared_input, self._outputs = None, {}


class RoutedLinear(nn.Module):
    """A frozen linear layer plus the LoRA products of the segments that train it.

    `group` holds the layers that read the same input, this one included: their products are one
    step of autograd, so that the gradient of the input is summed within the matmuls.

    `add_up_output` and `add_up_input_gradient` add what the other processes of a group computed, in place, where
    this layer is split among them.
    """

    def __init__(self, base: nn.Linear, name: str, route: Route) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.name = name
        self.route = route
        self.group: tuple[RoutedLinear, ...] = (self,)
        self.frozen = FrozenWeight(base.weight)
        self.anchor = torch.zeros((), device=base.weight.device, requires_grad=True)
        self.add_up_output: Callable[[Tensor], Tensor] | None = None
        self.add_up_input_gradient: Callable[[Tensor], Tensor] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's output.

        Shapes:
            inputs: (1, T, D); returns (1, T, F).
        """
        if self.route.sampled is not None:
            return self.route.sampled(self, inputs)
        return self.route.take(self, inputs)

    def base_product(self, rows_TD: Tensor) -> Tensor:
        """Return the frozen part, of shape (T, F)."""
        return self.frozen.product(rows_TD, self.bias)


def backward_pair(
    segment: Segment, name: str, grad_TF: Tensor, *, inner_TR: Tensor, rows_TD: Tensor
) -> Tensor:
    """Add the gradients of A and B to the segment's views and return that of the inner product.

    Shapes:
        all arguments hold the segment's own rows; returns (rows, R), not yet scaled.
    """
    pair, scaling = segment.weights.pairs[name], segment.weights.scaling
    grad_inner_TR = factor_product(grad_TF, pair.b.t())
    if segment.gradients is not None:
        gradient = segment.gradients[name]
        add_factor_gradient(gradient.a, grad_inner_TR, rows_TD, scaling)
        add_factor_gradient(gradient.b.t(), inner_TR, grad_TF, scaling)
    return grad_inner_TR


def _group_product(
    group: tuple[RoutedLinear, ...], inputs: Tensor, products: Sequence[Products]
) -> dict[str, Tensor]:
    """Return the outputs of all layers of a group by name, (1, T, F) each."""
    own = [some for some in products if any(layer.name in some.names for layer in group)]
    # The anchor makes the outputs require a gradient where the input does not: below the first
    # adapter nothing is then recorded.
    anchor = group[0].anchor if any(some.is_trained for some in own) else None
    rows_TD = inputs.reshape(-1, inputs.shape[-1])
    outputs: tuple[Tensor, ...] = _GroupProduct.apply(rows_TD, anchor, group, own)  # type: ignore[no-untyped-call]
    shape = inputs.shape[:-1]
    return {layer.name: output.view(*shape, -1) for layer, output in zip(group, outputs, strict=True)}


class _GroupProduct(torch.autograd.Function):
    """Base products of one group plus LoRA products; backward fills their gradients."""

    @staticmethod
    def forward(
        ctx: Any, rows_TD: Tensor, anchor: Tensor | None, group: tuple[RoutedLinear, ...], own: list[Products]
    ) -> tuple[Tensor, ...]:
        outputs = {layer.name: layer.base_product(rows_TD) for layer in group}
        kept = [some.add(outputs, rows_TD) for some in own]
        for layer in group:
            if layer.add_up_output is not None:
                layer.add_up_output(outputs[layer.name])
        ctx.save_for_backward(rows_TD)
        ctx.group, ctx.own, ctx.kept = group, own, kept
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (rows_TD,) = ctx.saved_tensors
        grad_rows_TD = _base_gradient(ctx.group, grads) if ctx.needs_input_grad[0] else None
        named = {layer.name: grad_TF for layer, grad_TF in zip(ctx.group, grads, strict=True)}
        for some, kept in zip(ctx.own, ctx.kept, strict=True):
            some.backward(named, kept, rows_TD=rows_TD, grad_rows_TD=grad_rows_TD)
        add_up = ctx.group[0].add_up_input_gradient
        if grad_rows_TD is not None and add_up is not None:
            add_up(grad_rows_TD)
        ctx.group = ctx.own = ctx.kept = None
        return grad_rows_TD, None, None, None


def _base_gradient(group: Sequence[RoutedLinear], grads: Sequence[Tensor]) -> Tensor:
    """Return the gradient of the shared input through the frozen products, (T, D)."""
    grad_rows_TD = group[0].frozen.transposed_product(grads[0])
    for layer, grad_TF in zip(group[1:], grads[1:], strict=True):
        layer.frozen.add_transposed_product(grad_rows_TD, grad_TF)
    return grad_rows_TD
