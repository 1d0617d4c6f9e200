"""Causal attention of one sequence on a CPU: blocks of rows, each by a few matrix products.

torch's own kernel computes half precision at the rate of float32 products or below, where oneDNN's products of
whole blocks are two to four times as fast; in float32, too, long sequences gain. Called by `attention`, for training.
Axes: H query heads, G key/value heads, N rows of the sequence, B rows of one block, L keys they see, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

_BLOCK_ROWS = {torch.float32: 128, torch.bfloat16: 256}
"""Larger blocks compute more of what the mask hides, smaller ones have slower products."""
_KEPT_ROWS = 512
"""Longer sequences compute their probabilities once more in backward instead of keeping them."""


def attend_by_blocks(query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
    """Return causal attention of one sequence.

    Shapes:
        query: (1, H, N, E); key, value: (1, G, N, E); returns (1, H, N, E).
    """
    output: Tensor = _BlockAttention.apply(query, key, value, scaling)  # type: ignore[no-untyped-call]
    return output


class _BlockAttention(torch.autograd.Function):
    """The query heads that share keys are rows of one product: (G, H/G x B, E) by (G, E, L)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        num_groups, size = key.shape[1], query.shape[3]
        # Copies of their own: where a sequence lies in its batch must not choose the kernel.
        queries = (query[0] * scaling).view(num_groups, -1, query.shape[2], size)
        keys, values = key[0].contiguous(), value[0].contiguous()
        output, kept = torch.empty_like(queries), []
        for block in _blocks(queries):
            probabilities = _probabilities(queries, keys, block)
            output[:, :, block] = _as_heads(torch.bmm(probabilities, values[:, : block.stop]), queries)
            kept.append(probabilities)
        ctx.save_for_backward(queries, keys, values, *(kept if query.shape[2] <= _KEPT_ROWS else ()))
        ctx.scaling = scaling
        return output.view_as(query)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, *kept = ctx.saved_tensors
        grads = grad_output[0].reshape(queries.shape)
        grad_queries = torch.empty_like(queries)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for number, block in enumerate(_blocks(queries)):
            rows, seen = _as_rows(grads, block), slice(block.stop)
            probabilities = kept[number] if kept else _probabilities(queries, keys, block)
            grad_values[:, seen].baddbmm_(probabilities.transpose(1, 2), rows)
            grad_scores = torch._softmax_backward_data(
                torch.bmm(rows, values[:, seen].transpose(1, 2)), probabilities, -1, rows.dtype
            )
            grad_queries[:, :, block] = _as_heads(torch.bmm(grad_scores, keys[:, seen]), queries)
            grad_keys[:, seen].baddbmm_(grad_scores.transpose(1, 2), _as_rows(queries, block))
        grad_query = grad_queries.mul_(ctx.scaling).view_as(grad_output)
        return grad_query, grad_keys[None], grad_values[None], None


def _blocks(queries: Tensor) -> Iterator[slice]:
    num_rows, length = queries.shape[2], _BLOCK_ROWS[queries.dtype]
    for start in range(0, num_rows, length):
        yield slice(start, min(start + length, num_rows))


def _probabilities(queries: Tensor, keys: Tensor, block: slice) -> Tensor:
    """Return what each row of a block gives to each key up to the block's end, (G, H/G x B, L)."""
    scores = torch.bmm(_as_rows(queries, block), keys[:, : block.stop].transpose(1, 2))
    num_rows = block.stop - block.start
    own = scores.view(len(keys), -1, num_rows, block.stop)[..., block]
    own.add_(_later(num_rows, scores.dtype))
    return torch.softmax(scores, dim=-1)


@cache
def _later(num_rows: int, dtype: torch.dtype) -> Tensor:
    """Return minus infinity for the keys after each row of a block, (B, B)."""
    return torch.full((num_rows, num_rows), float("-inf"), dtype=dtype).triu(1)


def _as_rows(heads: Tensor, block: slice) -> Tensor:
    """Return a block of (G, H/G, N, E) as (G, H/G x B, E)."""
    return heads[:, :, block].flatten(1, 2)


def _as_heads(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows (G, H/G x B, E) as (G, H/G, B, E)."""
    return rows.view(len(rows), like.shape[1], -1, rows.shape[2])
