"""Finding out how many rows a product needs before a row's bits stop depending on their number.

Called once per base model, at load.
Axes: D input features, F output features.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from gpuworker.engine.batching import MIN_BATCH_ROWS

_CANDIDATES = (4, 8)
_MANY_ROWS = 64


def find_row_step(layers: Iterable[tuple[Tensor, Tensor | None]]) -> int:
    """Return 4, 8 or 16: batches of any multiple of it leave a row's bits alone.

    Which row counts share a kernel is a property of the machine's libraries and its thread count,
    so it is tried out on every shape of the model. Decoding one sequence over 4 rows is about
    twice as fast as over 16, which were always enough.

    Args:
        layers: weight (F, D) and bias (F,) or None of every frozen product.
    """
    shapes = {(weight.shape, bias is None): (weight, bias) for weight, bias in layers}
    steps = [step for step in _CANDIDATES if all(_is_invariant(*layer, step) for layer in shapes.values())]
    return min(steps, default=MIN_BATCH_ROWS)


@torch.no_grad()
def _is_invariant(weight_FD: Tensor, bias_F: Tensor | None, step: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_MANY_ROWS, weight_FD.shape[1], generator=generator).to(weight_FD)
    many = functional.linear(rows, weight_FD, bias_F)
    return all(
        torch.equal(functional.linear(rows[:count].clone(), weight_FD, bias_F), many[:count])
        for count in range(step, MIN_BATCH_ROWS + 1, step)
    )
