"""Frozen products: rows through weights that need no gradient.

Axes: T rows, D input features, F output features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, cast

import torch
from torch import Tensor
from torch.nn import functional

_HAS_ONEDNN: Final = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
_TRIED_ROWS: Final = (4, 64)
_MANY_ROWS = 256


def frozen_linear(rows_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """Return `rows @ weight.T + bias`, of shape (T, F), without a gradient.

    In float32 on a CPU oneDNN takes the place of torch's BLAS: on AMD machines MKL leaves half of
    their speed unused. The kernel depends on the build alone, so that a replay finds the same bits.

    Source: the operator that torch.compile lowers linear layers to, in
    pytorch/pytorch: aten/src/ATen/native/mkldnn/Linear.cpp -> mkldnn_linear_pointwise.
    """
    if weight_FD.is_mkldnn or (
        _HAS_ONEDNN and rows_TD.dtype == torch.float32 and rows_TD.device.type == "cpu"
    ):
        product = torch.ops.mkldnn._linear_pointwise.default(rows_TD, weight_FD, bias_F, "none", [], "")
        return cast(Tensor, product)
    return functional.linear(rows_TD, weight_FD, bias_F)


def factor_product(rows_TD: Tensor, factor_RD: Tensor) -> Tensor:
    """Return `rows @ factor.T`, (T, R), with a factor of an adapter.

    oneDNN is twice as fast with many rows; with few, it is not, and a number of rows that is new to it costs time.
    """
    return frozen_linear(rows_TD, factor_RD) if len(rows_TD) >= _MANY_ROWS else rows_TD.mm(factor_RD.t())


def add_matmul(target: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """Add `alpha * left @ right` to `target` in place, also where `target` has a wider dtype."""
    if target.dtype == left.dtype:
        target.addmm_(left, right, alpha=alpha)
    elif target.is_cuda:
        torch.addmm(target, left, right, out_dtype=target.dtype, alpha=alpha, out=target)
    else:
        target.add_(left.mm(right), alpha=alpha)


def add_factor_gradient(target_RF: Tensor, left_TR: Tensor, right_TF: Tensor, alpha: float) -> None:
    """Add `alpha * left.T @ right` to the gradient of a factor in place; on a CPU many rows by oneDNN, as in `factor_product`."""
    if len(left_TR) >= _MANY_ROWS and not target_RF.is_cuda:
        target_RF.add_(frozen_linear(left_TR.t(), right_TF.t()), alpha=alpha)
    else:
        add_matmul(target_RF, left_TR.t(), right_TF, alpha)


class FrozenWeight:
    """A weight (F, D) and its products in both directions.

    On a CPU copies in oneDNN's own layout save it the reordering in each product, which is most of the time of
    a product of few rows; they change no bit.
    """

    def __init__(self, weight_FD: Tensor) -> None:
        self.plain = weight_FD
        self._forward = weight_FD
        self._backward = weight_FD.t()

    @property
    def num_bytes(self) -> int:
        """Return what a copy takes."""
        return self.plain.numel() * self.plain.itemsize

    def product(self, rows_TD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """Return `rows @ weight.T + bias`, (T, F)."""
        return frozen_linear(rows_TD, self._forward, bias_F)

    def transposed_product(self, rows_TF: Tensor) -> Tensor:
        """Return `rows @ weight`, (T, D)."""
        return frozen_linear(rows_TF, self._backward)

    def add_transposed_product(self, target_TD: Tensor, rows_TF: Tensor) -> None:
        """Add `rows @ weight` in place; a GPU does so within the product."""
        if target_TD.is_cuda:
            target_TD.addmm_(rows_TF, self.plain)
        else:
            target_TD.add_(self.transposed_product(rows_TF))

    def pack(self) -> int:
        """Hold a copy for `product`; return the bytes that it takes, 0 where there is none."""
        self._forward = _packed(self._forward)
        return self.num_bytes if self._forward.is_mkldnn else 0

    def pack_transposed(self) -> int:
        """Hold a copy for `transposed_product`, as `pack` does."""
        self._backward = _packed(self._backward)
        return self.num_bytes if self._backward.is_mkldnn else 0


def pack(weights: Sequence[FrozenWeight], *, room_bytes: int) -> int:
    """Hold copies of all weights as far as there is room: for products first, then for those transposed.

    Returns:
        the bytes that the copies take.
    """
    num_bytes = sum(weight.num_bytes for weight in weights)
    steps: tuple[Callable[[FrozenWeight], int], ...] = (FrozenWeight.pack, FrozenWeight.pack_transposed)
    held_bytes = 0
    for step in steps:
        if not _HAS_ONEDNN or held_bytes + num_bytes > room_bytes:
            break
        held_bytes += sum(step(weight) for weight in weights)
    return held_bytes


def _packed(weight_FD: Tensor) -> Tensor:
    """Return a copy in oneDNN's layout, or the weight itself where there is none or products with it have other bits."""
    if weight_FD.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weight_FD  # a processor without AVX-512
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_FD.contiguous(), None)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(max(_TRIED_ROWS), weight_FD.shape[1], generator=generator).to(weight_FD.dtype)
    is_same = all(
        torch.equal(frozen_linear(rows[:count], copy), frozen_linear(rows[:count], weight_FD))
        for count in _TRIED_ROWS
    )
    return copy if is_same else weight_FD
