"""Finding out how many rows a product needs before a row's bits stop depending on their number.

Called at load for the base model, and once for every shape of adapter that is sampled from.
Axes: D input features, F output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from gpuworker.engine.batching import MIN_BATCH_ROWS

_CANDIDATES = (4, 8)
_MANY_ROWS = 64

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Rows and a weight (F, D) give rows of F features."""


def find_row_step(weights: Iterable[Tensor], product: Product) -> int:
    """Return 4, 8 or 16: batches of any multiple of it leave a row's bits alone.

    Which row counts share a kernel is a property of the machine's libraries and its thread count,
    so it is tried out on every shape. Decoding one sequence over 4 rows is about twice as fast as
    over 16, which were always enough.
    """
    shapes = {weight.shape: weight for weight in weights}
    steps = [step for step in _CANDIDATES if all(_is_invariant(w, product, step) for w in shapes.values())]
    return min(steps, default=MIN_BATCH_ROWS)


@torch.no_grad()
def _is_invariant(weight_FD: Tensor, product: Product, step: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_MANY_ROWS, weight_FD.shape[1], generator=generator).to(weight_FD)
    many = product(rows, weight_FD)
    return all(
        torch.equal(product(rows[:count].clone(), weight_FD), many[:count])
        for count in range(step, MIN_BATCH_ROWS + 1, step)
    )
