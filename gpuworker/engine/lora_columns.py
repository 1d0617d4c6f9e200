"""LoRA products of several adapters in plain matrix products, for a CUDA device.

All rows go through the A of all adapters at once; of what comes out each row keeps the columns of its own adapter,
and the B of all adapters are then one more product, which adds to the layer's output by itself. That is more arithmetic
than grouped products have, in far fewer kernels.
Axes: T rows, K places of the bank, R rank, C = K * R columns, M layers of a group, D input and F output features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gpuworker.engine.bank_layout import Columns

MAX_COLUMNS = 256
"""The arithmetic grows with the columns of other adapters; up to so many it was found to take less time than grouped products."""


class ColumnProducts:
    """The products of all adapters of a bank that is trained.

    A row whose numbers are not finite makes the gradients of all adapters so: zero times infinity.

    Shapes:
        share_TC: alpha / rank in the columns of a row's own adapter, else 0.
    """

    def __init__(self, weights: Columns, gradients: Columns, share_TC: Tensor) -> None:
        self.names = weights.b
        self._weights = weights
        self._gradients = gradients
        self._share_T1C = share_TC[:, None]

    @property
    def is_trained(self) -> bool:
        """Return that gradients are wanted."""
        return True

    def add(self, outputs: Mapping[str, Tensor], rows_TD: Tensor) -> Tensor:
        """Add the products of a group in place and return the scaled inner products, (T, M, C)."""
        inner_TMC = columns_of(rows_TD, self._weights.a[tuple(outputs)], len(outputs)).mul_(self._share_T1C)
        for number, (name, output_TF) in enumerate(outputs.items()):
            output_TF.addmm_(inner_TMC[:, number], self._weights.b[name].t())
        return inner_TMC

    def backward(
        self, grads: Mapping[str, Tensor], kept: Tensor, *, rows_TD: Tensor, grad_rows_TD: Tensor | None
    ) -> None:
        """Write the gradients of A and B; add that of the input rows in place where it is wanted."""
        names, inner_TMC = tuple(grads), kept
        grad_inner_TMC = torch.empty_like(inner_TMC)
        for number, (name, grad_TF) in enumerate(grads.items()):
            torch.mm(grad_TF, self._weights.b[name], out=grad_inner_TMC[:, number])
            _write_product(self._gradients.b[name], grad_TF.t(), inner_TMC[:, number])
        grad_inner_TX = grad_inner_TMC.mul_(self._share_T1C).flatten(1)
        _write_product(self._gradients.a[names], grad_inner_TX.t(), rows_TD)
        if grad_rows_TD is not None:
            grad_rows_TD.addmm_(grad_inner_TX, self._weights.a[names])

    def finish(self) -> None:
        """Nothing is handed over: the gradients are where the caller wanted them."""


def columns_of(rows_TD: Tensor, a_XD: Tensor, num_layers: int) -> Tensor:
    """Return the inner products of the rows with the A of all adapters and layers of a group, (T, M, C)."""
    return rows_TD.mm(a_XD.t()).view(len(rows_TD), num_layers, -1)


def _write_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Write `left @ right` to a target that may have a wider dtype."""
    if target.dtype == left.dtype:
        torch.mm(left, right, out=target)
    else:
        torch.mm(left, right, out_dtype=target.dtype, out=target)
