"""The frozen matrix products of a training step and nothing else, and the fastest product of the device.

Axes: T rows, D input features, F output features.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import TypeAlias

import torch
from torch import Tensor

from bench.shapes import RandomModel, Shape
from bench.timing import free, timed
from gpuworker.engine.memory import available_bytes
from gpuworker.engine.products import FrozenWeight, frozen_linear, pack

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Rows (T, D) and a weight (F, D) give rows of F features."""
_HEAD_ROWS = {"cpu": 512, "cuda": 2048}


class Floor:
    """Forward and backward to the activations of every frozen projection of `num_rows` tokens; weights are random.

    Each layer has weights of its own, as in a model, so that a cache does not keep them from layer to layer.
    """

    def __init__(self, model: RandomModel, num_rows: int) -> None:
        shape, device = model.shape, model.device
        dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
        self.products: list[tuple[Tensor, Tensor, FrozenWeight]] = []
        self.num_flops = 0
        rows: dict[tuple[int, int], Tensor] = {}

        def add(num: int, d: int, f: int) -> None:
            for width in (d, f):
                if (num, width) not in rows:
                    rows[num, width] = torch.randn(num, width, device=device, dtype=dtype)
            weight_FD = torch.randn(f, d, device=device, dtype=dtype)
            self.products.append((rows[num, d], rows[num, f], FrozenWeight(weight_FD)))
            self.num_flops += 4 * num * d * f

        for _ in range(shape.num_layers):
            for d, f in projections(shape):
                add(num_rows, d, f)
        chunk = _HEAD_ROWS[device.type]
        for start in range(0, num_rows, chunk):
            add(min(chunk, num_rows - start), shape.hidden_size, shape.vocab_size)
        if device.type == "cpu":
            pack([weight for _, _, weight in self.products], room_bytes=available_bytes() // 4)

    def run(self) -> float:
        """Multiply everything once, forward and backward, as the engine does."""
        for rows_TD, rows_TF, weight in self.products:
            weight.product(rows_TD)
            weight.transposed_product(rows_TF)
        return 0.0

    def run_mm(self) -> float:
        """Multiply everything once, forward and backward, by torch.mm."""
        for rows_TD, rows_TF, weight in self.products:
            _mm(rows_TD, weight.plain)
            _mm(rows_TF, weight.plain.t())
        return 0.0


def projections(shape: Shape) -> list[tuple[int, int]]:
    """Return input and output features of the seven projections of a layer."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return [
        *((hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)),
        *((hidden, inner), (hidden, inner), (inner, hidden)),
    ]


def best_matmul(model: RandomModel, num_rows: int) -> tuple[float, str]:
    """Return the fastest rate of a product over the model's own shapes in TFLOP/s, and which one it was."""
    dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    repeats = 20 if model.device.type == "cuda" else 3
    rates: list[tuple[float, str]] = []
    for d, f in dict.fromkeys(projections(model.shape)):
        rows_TD = torch.randn(num_rows, d, device=model.device, dtype=dtype)
        weight_FD = torch.randn(f, d, device=model.device, dtype=dtype)
        for name, product in (("torch.mm", _mm), ("the engine's product", frozen_linear)):

            def multiply(by: Product = product, x: Tensor = rows_TD, w: Tensor = weight_FD) -> None:
                for _ in range(repeats):
                    by(x, w)

            multiply()
            seconds = median(timed(multiply, model.device) for _ in range(5))
            rate = repeats * 2 * num_rows * d * f / seconds / 1e12
            rates.append((rate, f"{num_rows} x {d} x {f}, {name}"))
    free(model.device)
    return max(rates)


def _mm(rows_TD: Tensor, weight_FD: Tensor) -> Tensor:
    return torch.mm(rows_TD, weight_FD.t())
