"""One forward_backward as the engine computes it: its data checked, in blocks, and what has come of them so far.

Axes: N rows of one block, K targets per row, P parameters of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpuworker.engine.adapters import Adapter, LoraPair
from gpuworker.engine.exceptions import DatumError, NonFiniteError
from gpuworker.engine.losses import BoundLoss
from gpuworker.engine.types import Datum, Float32Array, ForwardBackward, ForwardBackwardResult, Int64Array

Scalar = TypeVar("Scalar", bound=np.generic)
# All rows of a job get as many targets as that with the most.
MAX_TARGETS = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Block:
    """Whole data of one job that always go through the model together.

    Shapes:
        targets_NK: int64; inputs: float32 (N, K) each; trained_N: bool, rows that carry loss.
            Data with fewer than K targets are filled up with target 0 and weight 0.
    """

    tokens: tuple[Int64Array, ...]
    targets_NK: Int64Array
    inputs: Mapping[str, Float32Array]
    trained_N: npt.NDArray[np.bool_]

    @property
    def num_rows(self) -> int:
        """Return N."""
        return len(self.targets_NK)


class Job:
    """One checked forward_backward with what has been computed of it so far."""

    def __init__(
        self, request: ForwardBackward, adapter: Adapter, loss: BoundLoss, blocks: list[Block]
    ) -> None:
        self.request = request
        self.adapter = adapter
        self.loss = loss
        self.blocks = blocks
        self.reset()

    def reset(self) -> None:
        """Forget everything computed."""
        self.gradient_P: Tensor | None = None
        self.gradients: Mapping[str, LoraPair] | None = None
        self.logprobs: list[Float32Array] = []
        self.loss_sum = 0.0
        self.is_exposed = False  # to numbers of other jobs that are not finite

    @property
    def is_done(self) -> bool:
        """Return whether every block has been through the model."""
        return len(self.logprobs) == len(self.blocks)

    def start_gradient(self) -> Mapping[str, LoraPair] | None:
        """Return the job's own gradient views, None for a forward only."""
        if self.request.backward and self.gradients is None:
            self.gradient_P = torch.zeros_like(self.adapter.master_P)
            self.gradients = self.adapter.layout.own_views(self.gradient_P)
        return self.gradients

    def finish(self, gradient_sum: float) -> ForwardBackwardResult:
        """Hand the gradient to the adapter and return the result.

        Args:
            gradient_sum: of all its numbers, in float64.
        Raises:
            NonFiniteError: loss, log-probabilities or gradient are not finite; nothing was added.
        """
        gradient_P, self.gradient_P, self.gradients = self.gradient_P, None, None
        if not math.isfinite(self.loss_sum):
            raise NonFiniteError(f"the loss is {self.loss_sum}")
        if not all(np.isfinite(values_NK).all() for values_NK in self.logprobs):
            raise NonFiniteError("the log-probabilities are not finite")
        if not math.isfinite(gradient_sum):
            raise NonFiniteError("the gradient is not finite")
        if gradient_P is not None:
            self.adapter.accumulate(gradient_P)
        return ForwardBackwardResult(logprobs=self._split_logprobs(), metrics=self._metrics())

    def _split_logprobs(self) -> tuple[Float32Array, ...]:
        rows_NK, start, split = np.concatenate(self.logprobs), 0, []
        for datum in self.request.data:
            stop = start + len(datum.tokens)
            part = rows_NK[start:stop]
            is_flat = datum.target_tokens.ndim == 1
            split.append(part[:, 0].copy() if is_flat else part[:, : datum.target_tokens.shape[1]].copy())
            start = stop
        return tuple(split)

    def _metrics(self) -> dict[str, float]:
        if all("weights" in block.inputs for block in self.blocks):
            weight = sum(
                float(np.abs(block.inputs["weights"]).sum(dtype=np.float64)) for block in self.blocks
            )
        else:
            weight = float(sum(int(block.trained_N.sum()) for block in self.blocks))
        num_tokens = sum(block.num_rows for block in self.blocks)
        return {"loss:sum": self.loss_sum, "tokens:sum": float(num_tokens), "loss_weight:sum": weight}


def check_datum(datum: Datum, index: int, *, vocab_size: int, max_context: int) -> None:
    """Check shapes and token ids of one datum.

    Raises:
        DatumError: names the datum by its index and says what is wrong with it.
    """
    tokens, targets = datum.tokens, datum.target_tokens
    if tokens.ndim != 1 or not 1 <= len(tokens) <= max_context:
        raise DatumError(f"datum {index}: tokens of shape {tokens.shape}; 1 to {max_context} tokens fit")
    if targets.ndim not in (1, 2) or len(targets) != len(tokens) or targets.size == 0:
        raise DatumError(
            f"datum {index}: target_tokens of shape {targets.shape} do not suit {len(tokens)} tokens"
        )
    for name, ids in (("tokens", tokens), ("target_tokens", targets)):
        if ids.min() < 0 or ids.max() >= vocab_size:
            odd = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise DatumError(f"datum {index}: {name} holds {odd}, outside the vocabulary 0..{vocab_size - 1}")


def num_targets(datum: Datum) -> int:
    return 1 if datum.target_tokens.ndim == 1 else int(datum.target_tokens.shape[1])


def build_block(data: Sequence[Datum], loss: BoundLoss, width: int) -> Block:
    """Return one block; raises DatumError or LossFunctionError where a datum's tensors do not fit."""
    targets, trained, columns = [], [], []
    for datum in data:
        if datum.target_tokens.ndim == 2 and loss.name != "cross_entropy":
            raise DatumError(f"{loss.name} takes one target per position, not {datum.target_tokens.shape}")
        inputs = loss.select_inputs(datum.inputs)
        for name, values in inputs.items():
            if values.shape != datum.target_tokens.shape:
                raise DatumError(
                    f"{name} has shape {values.shape}, target_tokens have {datum.target_tokens.shape}"
                )
        wide = {name: _widen(values, width) for name, values in inputs.items()}
        shape = (len(datum.tokens), width)
        targets.append(_widen(datum.target_tokens, width))
        trained.append(loss.trained(wide, shape).any(axis=1))
        columns.append(wide)
    return Block(
        tokens=tuple(datum.tokens for datum in data),
        targets_NK=np.concatenate(targets).astype(np.int64, copy=False),
        inputs={
            name: np.concatenate([column[name] for column in columns]).astype(np.float32, copy=False)
            for name in columns[0]
        },
        trained_N=np.concatenate(trained),
    )


def _widen(values: npt.NDArray[Scalar], width: int) -> npt.NDArray[Scalar]:
    """Return (N,) or (N, k) values as (N, width), with zeros in the new columns."""
    columns = values.reshape(len(values), -1)
    missing = width - columns.shape[1]
    return np.pad(columns, ((0, 0), (0, missing))) if missing else columns
