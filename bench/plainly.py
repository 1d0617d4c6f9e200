"""What parts of the engine do, in the plain way that they replace; `bench.ablation` puts it in their place.

Axes: T rows of the packed batch, D input and F output features, N rows of one segment, R rank, P parameters
of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.adamw import adamw

from gpuworker.engine.adapters import LoraPair
from gpuworker.engine.attention import PackedAttention, attend_causal
from gpuworker.engine.logprobs import Head, HeadPiece, PieceScore
from gpuworker.engine.lora import Products, RoutedLinear, Scoring, Segment
from gpuworker.engine.norms import FusedNorm
from gpuworker.engine.optimizer import _Update

__all__ = ["AttentionOneByOne", "FusedNorm", "apply_by_factor", "group_product", "norm", "score_every_row"]

Score = Callable[[Head, Tensor, Sequence[HeadPiece], Tensor | None], list[PieceScore]]


class AttentionOneByOne(PackedAttention):
    """Sequence by sequence in the model's own dtype, on any device."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return the attention output, (1, T, H, E), of (1, H, T, E) queries."""
        parts = zip(*(torch.split(part, self.lengths, dim=2) for part in (query, key, value)), strict=True)
        return torch.cat([attend_causal(q, k, v, scoring).transpose(1, 2) for q, k, v in parts], dim=1)


def group_product(
    group: tuple[RoutedLinear, ...], inputs: Tensor, products: Sequence[Products]
) -> dict[str, Tensor]:
    """Return each layer's output as autograd's own steps make it; adapters get their gradients from autograd."""
    outputs = {}
    for layer in group:
        output = functional.linear(inputs[0], layer.weight, layer.bias)
        parts = [
            _lora(inputs[0], segment, layer.name) for segment in products if isinstance(segment, Segment)
        ]
        covered = sum(len(part) for part in parts)
        rest = output.new_zeros(len(output) - covered, output.shape[1])
        outputs[layer.name] = (output + torch.cat([*parts, rest]))[None]
    return outputs


def _lora(rows_TD: Tensor, segment: Segment, name: str) -> Tensor:
    """Return a segment's product (N, F); segments lie behind each other from the first row on."""
    pair = segment.weights.pairs[name]
    if segment.gradients is not None:
        kept = segment.gradients[name]
        pair = LoraPair(_leaf(pair.a, kept.a), _leaf(pair.b, kept.b))
    rows_ND = rows_TD[segment.start : segment.stop]
    return functional.linear(functional.linear(rows_ND, pair.a), pair.b) * segment.weights.scaling


def _leaf(factor: Tensor, kept: Tensor) -> Tensor:
    """Return a factor as a leaf of autograd whose gradient is added to `kept`."""
    leaf = factor.detach().requires_grad_()

    def keep(gradient: Tensor) -> None:
        kept.add_(gradient)

    leaf.register_hook(keep)
    return leaf


def score_every_row(score: Score) -> Score:
    """Return the head's `score` with a backward of all rows, whether they have a loss or not."""

    def score_all(
        head: Head, hidden_TD: Tensor, pieces: Sequence[HeadPiece], grad_hidden_TD: Tensor | None
    ) -> list[PieceScore]:
        if grad_hidden_TD is not None:
            pieces = [replace(piece, backward=True) for piece in pieces]
        return score(head, hidden_TD, pieces, grad_hidden_TD)

    return score_all


def apply_by_factor(group: Sequence[_Update], _step_counts: list[Tensor]) -> None:
    """Apply AdamW to the two factors of each projection as tensors of their own, torch's fastest call for many."""
    params = group[0].due.params
    for update in group:
        adapter = update.due.adapter
        flat = (adapter.master_P, update.gradient_P, adapter.exp_avg_P, adapter.exp_avg_sq_P)
        weights, gradients, exp_avgs, exp_avg_sqs = (
            [factor for pair in adapter.layout.views(buffer_P).values() for factor in pair]
            for buffer_P in flat
        )
        adamw(
            weights,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            list(torch.full((len(weights),), float(adapter.step), device=flat[0].device).unbind()),
            fused=True,
            amsgrad=False,
            beta1=params.beta1,
            beta2=params.beta2,
            lr=params.learning_rate,
            weight_decay=params.weight_decay,
            eps=params.eps,
            maximize=False,
        )


def norm(module: FusedNorm, hidden_TD: Tensor) -> Tensor:
    """Return RMS-normed rows as transformers computes them, step by step in float32."""
    wide = hidden_TD.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.eps)
    return module.weight * wide.to(hidden_TD.dtype)
