"""Attention by blocks: the numbers of torch's own kernel, whatever the length, grouping and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpuworker.engine.block_attention import attend_by_blocks

SIZE, SCALING = 40, 0.2


def heads(num_heads: int, num_rows: int, seed: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, num_heads, num_rows, SIZE, generator=generator)
    return values.to(dtype).requires_grad_()


def by_blocks(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...] | list[int] = ()) -> Tensor:
    """Return the attention of one sequence, or of several, with heads first as in torch's own: (1, H, T, E)."""
    lengths = lengths or [query.shape[2]]
    return attend_by_blocks(query, key, value, lengths, scaling=SCALING).transpose(1, 2)


def gradients(output: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(output.shape, generator=generator).to(output.dtype)
    return [one.float() for one in torch.autograd.grad(output, inputs, grad)]


@pytest.mark.parametrize(
    ("dtype", "tolerance", "relative_error"), [(torch.float32, 2e-6, 2e-6), (torch.bfloat16, 3e-2, 1e-2)]
)
@pytest.mark.parametrize("num_rows", [2, 65, 256, 257, 530])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_it_gives_what_torchs_attention_in_float32_gives(
    num_rows: int, num_groups: int, dtype: torch.dtype, tolerance: float, relative_error: float
) -> None:
    query = heads(4, num_rows, 1, dtype=dtype)
    key, value = (heads(num_groups, num_rows, seed, dtype=dtype) for seed in (2, 3))
    wide = tuple(one.detach().float().requires_grad_() for one in (query, key, value))
    expected = scaled_dot_product_attention(
        wide[0], wide[1], wide[2], is_causal=True, scale=SCALING, enable_gqa=True
    )
    actual = by_blocks(query, key, value)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)
    for one, other in zip(gradients(actual, (query, key, value)), gradients(expected, wide), strict=True):
        assert (one - other).norm() <= relative_error * other.norm()


def test_a_row_sees_nothing_behind_it() -> None:
    query, key, value = heads(2, 300, 1), heads(2, 300, 2), heads(2, 300, 3)
    whole = by_blocks(query, key, value)
    changed_key, changed_value = key.detach().clone(), value.detach().clone()
    changed_key[:, :, 280:], changed_value[:, :, 280:] = 50.0, -50.0
    changed = by_blocks(query, changed_key, changed_value)
    assert torch.equal(changed[:, :, :280], whole[:, :, :280])
    assert not torch.equal(changed[:, :, 280:], whole[:, :, 280:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("rows_first", [True, False])
def test_where_a_sequence_lies_and_beside_which_changes_no_bit(
    dtype: torch.dtype, num_groups: int, rows_first: bool
) -> None:
    counts = (4, num_groups, num_groups)
    query, key, value = (heads(count, 290, seed, dtype=dtype) for seed, count in enumerate(counts))
    alone = by_blocks(query, key, value)
    around = [
        [one.new_ones(1, one.shape[1], 77, SIZE), one, one.new_ones(1, one.shape[1], 530, SIZE)]
        for one in (query, key, value)
    ]
    wide = [torch.cat(parts, dim=2) for parts in around]
    if rows_first:
        wide = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in wide]
    whole = by_blocks(wide[0], wide[1], wide[2], lengths=[77, 290, 530])
    own = whole[:, :, 77:367]
    assert torch.equal(own, alone)
    for one, other in zip(
        gradients(own, (query, key, value)), gradients(alone, (query, key, value)), strict=True
    ):
        assert torch.equal(one, other)


def test_many_blocks_lose_no_precision() -> None:
    query, key, value = heads(1, 4000, 1), heads(1, 4000, 2), heads(1, 4000, 3)
    wide = tuple(one.detach().float().requires_grad_() for one in (query, key, value))
    expected = scaled_dot_product_attention(wide[0], wide[1], wide[2], is_causal=True, scale=SCALING)
    actual = by_blocks(query, key, value)
    for one, other in zip(gradients(actual, (query, key, value)), gradients(expected, wide), strict=True):
        assert (one - other).norm() <= 7.5e-3 * other.norm()
