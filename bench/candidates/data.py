"""The same sequences as each candidate takes them: a padded rectangle, sorted rectangles, one packed row, data.

Every sequence is one token longer than its input: the last token is only a target.
Axes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpuworker.engine.types import Datum

_IGNORED = -100
_CPU = torch.device("cpu")


class Part(NamedTuple):
    """What goes through a transformers model at once; targets are -100 where there is nothing to learn.

    `mask_BT` of None leaves it to transformers to find the sequences of a packed row by `positions_BT`.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    mask_BT: Tensor | None
    positions_BT: Tensor | None


def pad(sequences: Sequence[list[int]], device: torch.device = _CPU) -> Part:
    """Return one rectangle as long as the longest sequence."""
    length = max(map(len, sequences)) - 1
    tokens_BT = torch.zeros(len(sequences), length, dtype=torch.int64)
    targets_BT = torch.full_like(tokens_BT, _IGNORED)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence) - 1] = torch.tensor(sequence[:-1])
        targets_BT[row, : len(sequence) - 1] = torch.tensor(sequence[1:])
        mask_BT[row, : len(sequence) - 1] = 1
    return Part(tokens_BT.to(device), targets_BT.to(device), mask_BT.to(device), None)


def pack(sequences: Sequence[list[int]], device: torch.device = _CPU) -> Part:
    """Return all sequences behind each other in one row, positions starting anew with each."""
    tokens = torch.tensor([token for sequence in sequences for token in sequence[:-1]])
    targets = torch.tensor([token for sequence in sequences for token in sequence[1:]])
    positions = torch.cat([torch.arange(len(sequence) - 1) for sequence in sequences])
    return Part(tokens[None].to(device), targets[None].to(device), None, positions[None].to(device))


def micro_batches(sequences: Sequence[list[int]], max_tokens: int) -> list[list[list[int]]]:
    """Return the sequences sorted by length, in parts whose rectangles have a bounded number of tokens."""
    parts: list[list[list[int]]] = [[]]
    for sequence in sorted(sequences, key=len):
        if parts[-1] and (len(parts[-1]) + 1) * (len(sequence) - 1) > max_tokens:
            parts.append([])
        parts[-1].append(sequence)
    return parts


def engine_data(sequences: Sequence[list[int]], *, prompt_share: float = 0.0) -> tuple[Datum, ...]:
    """Return the sequences as the engine takes them; the first part of each, its prompt, has no loss."""
    data = []
    for sequence in sequences:
        weights = np.ones(len(sequence) - 1, dtype=np.float32)
        weights[: int(prompt_share * len(weights))] = 0
        data.append(
            Datum(
                tokens=np.array(sequence[:-1]),
                target_tokens=np.array(sequence[1:]),
                inputs={"weights": weights},
            )
        )
    return tuple(data)
