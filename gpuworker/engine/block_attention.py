"""Causal attention of adjacent sequences on a CPU: blocks of rows, each by a few matrix products.

torch's own kernel computes half precision at the rate of float32 products or below, where oneDNN's products of
whole blocks are two to four times as fast; in float32, too, long sequences gain. Called by `attention`, for training.
Axes: H query heads, G key/value heads, T rows of all sequences, N rows of one, B rows of one block, L keys they see,
E head size. The query heads that share keys are rows of one product: (G, H/G x B, E) by (G, E, L).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BLOCK_ROWS = {torch.float32: 128, torch.bfloat16: 256}
"""Larger blocks compute more of what the mask hides, smaller ones have slower products."""
_KEPT_ROWS = 512
"""Longer sequences compute their probabilities once more in backward instead of keeping them."""


def attend_by_blocks(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, scaling: float
) -> Tensor:
    """Return causal attention, of every sequence to itself.

    Shapes:
        query: (1, H, T, E); key, value: (1, G, T, E), T the sum of `lengths`; returns (1, T, H, E).
    """
    output: Tensor = _BlockAttention.apply(query, key, value, lengths, scaling)  # type: ignore[no-untyped-call]
    return output


class _Block(NamedTuple):
    """Rows of a sequence: (G, H/G x B, E) queries, scaled, and what they give to each key, (G, H/G x B, L), or None."""

    start: int
    stop: int
    queries: Tensor
    probabilities: Tensor | None


class _Sequence(NamedTuple):
    """Rows of the batch from `start` on: (G, N, E) keys and values, and the blocks."""

    start: int
    keys: Tensor
    values: Tensor
    blocks: list[_Block]


class _BlockAttention(torch.autograd.Function):
    """All copies that a product reads are its own: where a sequence lies in its batch must not choose the kernel."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float
    ) -> Tensor:
        output, num_groups = query.new_empty(query.transpose(1, 2).shape), key.shape[1]
        queries, outputs = _grouped(query, num_groups), _grouped(output.transpose(1, 2), num_groups)
        sequences, start = [], 0
        for num_rows in lengths:
            keys, values = (_copy(heads[0, :, start : start + num_rows]) for heads in (key, value))
            sequence = _Sequence(start, keys, values, [])
            for begin, end in _bounds(num_rows, query.dtype):
                rows = slice(start + begin, start + end)
                block = _Block(begin, end, _as_rows(queries[:, :, rows]) * scaling, None)
                probabilities = _probabilities(block, keys)
                _write_rows(outputs[:, :, rows], torch.bmm(probabilities, values[:, :end]))
                is_kept = num_rows <= _KEPT_ROWS
                sequence.blocks.append(block._replace(probabilities=probabilities) if is_kept else block)
            start += num_rows
            if any(ctx.needs_input_grad):
                sequences.append(sequence)
        ctx.sequences, ctx.scaling, ctx.num_groups = sequences, scaling, num_groups
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        grad_outputs = _grouped(grad_output.transpose(1, 2), ctx.num_groups)
        _, num_rows, num_heads, size = grad_output.shape
        grad_query = grad_output.new_empty(1, num_rows, num_heads, size).transpose(1, 2)
        grad_queries = _grouped(grad_query, ctx.num_groups)
        grad_key, grad_value = grad_output.new_empty(2, 1, num_rows, ctx.num_groups, size).transpose(2, 3)
        for start, keys, values, blocks in ctx.sequences:
            grad_keys, grad_values = keys.new_zeros(2, *keys.shape, dtype=torch.float32)
            for block in blocks:
                rows, seen = slice(start + block.start, start + block.stop), slice(block.stop)
                grad_rows = _as_rows(grad_outputs[:, :, rows])
                probabilities = block.probabilities
                if probabilities is None:
                    probabilities = _probabilities(block, keys)
                # Not baddbmm_: into a part of a tensor it goes head by head.
                grad_values[:, seen] += torch.bmm(probabilities.transpose(1, 2), grad_rows)
                grad_scores = torch._softmax_backward_data(
                    torch.bmm(grad_rows, values[:, seen].transpose(1, 2)), probabilities, -1, keys.dtype
                )
                grad_keys[:, seen] += torch.bmm(grad_scores.transpose(1, 2), block.queries)
                _write_rows(grad_queries[:, :, rows], torch.bmm(grad_scores, keys[:, seen]).mul_(ctx.scaling))
            part = slice(start, start + keys.shape[1])
            grad_key[0, :, part], grad_value[0, :, part] = grad_keys, grad_values
        ctx.sequences = None
        return grad_query, grad_key, grad_value, None, None


def _bounds(num_rows: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Yield the first row of each block and the row behind its last one."""
    length = _BLOCK_ROWS[dtype]
    for start in range(0, num_rows, length):
        yield start, min(start + length, num_rows)


def _probabilities(block: _Block, keys: Tensor) -> Tensor:
    """Return what each row of a block gives to each key up to the block's end, (G, H/G x B, L)."""
    scores = torch.bmm(block.queries, keys[:, : block.stop].transpose(1, 2))
    num_rows = block.stop - block.start
    own = scores.view(len(keys), -1, num_rows, block.stop)[..., block.start :]
    own.add_(_later(num_rows, scores.dtype))
    return torch.softmax(scores, dim=-1)


@cache
def _later(num_rows: int, dtype: torch.dtype) -> Tensor:
    """Return minus infinity for the keys after each row of a block, (B, B)."""
    return torch.full((num_rows, num_rows), float("-inf"), dtype=dtype).triu(1)


def _grouped(heads: Tensor, num_groups: int) -> Tensor:
    """Return a view (G, H/G, T, E) of (1, H, T, E)."""
    return heads[0].view(num_groups, -1, *heads.shape[2:])


def _as_rows(heads: Tensor) -> Tensor:
    """Return (G, H/G, B, E) as (G, H/G x B, E)."""
    return _copy(heads).flatten(1, 2)


def _copy(heads: Tensor) -> Tensor:
    return heads.clone(memory_format=torch.contiguous_format)


def _write_rows(heads: Tensor, rows: Tensor) -> None:
    """Write rows (G, H/G x B, E) where the heads (G, H/G, B, E) lie."""
    heads.copy_(rows.view(heads.shape))
