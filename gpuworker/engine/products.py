"""Frozen products: rows through weights that need no gradient.

Axes: T rows, D input features, F output features.
"""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import Tensor
from torch.nn import functional

_HAS_ONEDNN: Final = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def frozen_linear(rows_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """Return `rows @ weight.T + bias`, of shape (T, F), without a gradient.

    In float32 on a CPU oneDNN takes the place of torch's BLAS: on AMD machines MKL leaves half of
    their speed unused. The kernel depends on the build alone, so that a replay finds the same bits.

    Source: the operator that torch.compile lowers linear layers to, in
    pytorch/pytorch: aten/src/ATen/native/mkldnn/Linear.cpp -> mkldnn_linear_pointwise.
    """
    if _HAS_ONEDNN and rows_TD.dtype == torch.float32 and rows_TD.device.type == "cpu":
        product = torch.ops.mkldnn._linear_pointwise.default(rows_TD, weight_FD, bias_F, "none", [], "")
        return cast(Tensor, product)
    return functional.linear(rows_TD, weight_FD, bias_F)
