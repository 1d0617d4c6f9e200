"""Frozen weights: copies in another layout give the same bits, and are held only where there is room."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpuworker.engine import products
from gpuworker.engine.products import FrozenWeight, frozen_linear

DTYPES = (torch.float32, torch.bfloat16)


def make(dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(40, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_packed(weight: FrozenWeight) -> tuple[bool, bool]:
    return weight._forward.is_mkldnn, weight._backward.is_mkldnn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [4, 16, 100])
def test_packed_weights_give_the_bits_of_plain_ones(dtype: torch.dtype, num_rows: int) -> None:
    plain, packed = FrozenWeight(make(dtype)), FrozenWeight(make(dtype))
    products.pack([packed], room_bytes=1 << 20)
    has_layout = dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert is_packed(packed) == (has_layout, has_layout)
    rows_TD, rows_TF = torch.randn(num_rows, 24).to(dtype), torch.randn(num_rows, 40).to(dtype)
    bias_F = torch.randn(40).to(dtype)
    assert torch.equal(packed.product(rows_TD, bias_F), plain.product(rows_TD, bias_F))
    assert torch.equal(packed.transposed_product(rows_TF), plain.transposed_product(rows_TF))
    torch.testing.assert_close(plain.product(rows_TD).float(), (rows_TD @ make(dtype).t()).float())


def test_without_room_for_all_nothing_is_copied() -> None:
    weights = [FrozenWeight(make(torch.float32, seed)) for seed in range(3)]
    num_bytes = sum(weight.num_bytes for weight in weights)
    assert products.pack(weights, room_bytes=num_bytes - 1) == 0
    assert {is_packed(weight) for weight in weights} == {(False, False)}
    assert products.pack(weights, room_bytes=2 * num_bytes - 1) == num_bytes
    assert {is_packed(weight) for weight in weights} == {(True, False)}


def test_a_copy_that_would_change_bits_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def another_kernel(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = frozen_linear(rows, weight, bias)
        return product + 1e-3 if weight.is_mkldnn else product

    monkeypatch.setattr(products, "frozen_linear", another_kernel)
    weight = FrozenWeight(make(torch.float32))
    assert products.pack([weight], room_bytes=1 << 20) == 0
    assert is_packed(weight) == (False, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [3, 300])
def test_a_factors_gradient_is_added_in_either_layout(dtype: torch.dtype, num_rows: int) -> None:
    left_TR, right_TF = torch.randn(num_rows, 8).to(dtype), torch.randn(num_rows, 40).to(dtype)
    expected = 1 + 2.0 * left_TR.double().t() @ right_TF.double()
    rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (1e-2, 1e-2)
    for target in (torch.ones(8, 40), torch.ones(40, 8).t()):
        products.add_factor_gradient(target, left_TR, right_TF, 2.0)
        torch.testing.assert_close(target.double(), expected, rtol=rtol, atol=atol)
