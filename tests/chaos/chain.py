"""A run as a hash chain: every operation's effect and answer is a SHA-256 over the state before and the request.

One missing, doubled or swapped operation changes all that follows. The chain engine computes with it in the
worker; the oracle computes the same from what the clients meant to send. Plain Python, no torch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

EMPTY: Final = bytes(32)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One datum of a forward_backward."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    weights: tuple[float, ...]

    def packed(self) -> bytes:
        """Return all that the datum says."""
        count = len(self.tokens)
        return struct.pack(f"<i{count}q{count}q{count}f", count, *self.tokens, *self.targets, *self.weights)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The state of one adapter; `gradient` is None when nothing was accumulated since the last step."""

    weights: bytes
    average: bytes = EMPTY
    square: bytes = EMPTY
    gradient: bytes | None = None
    step: int = 0


def begin(*, seed: int, rank: int) -> Chain:
    """Return a new adapter."""
    return Chain(weights=_hash(b"begin", struct.pack("<qi", seed, rank)))


def forward(chain: Chain, examples: Sequence[Example], *, backward: bool) -> tuple[Chain, bytes]:
    """Return the state after a forward or forward_backward, and what it answers."""
    packed = b"".join(example.packed() for example in examples)
    answer = _hash(b"backward" if backward else b"forward", chain.weights, chain.gradient or EMPTY, packed)
    return (replace(chain, gradient=answer) if backward else chain), answer


def optim_step(chain: Chain, learning_rate: float) -> tuple[Chain, float]:
    """Return the state after an optimizer step, and its gradient norm."""
    rate = struct.pack("<d", learning_rate)
    average = _hash(b"average", chain.average, chain.gradient or EMPTY, rate)
    square = _hash(b"square", chain.square, chain.gradient or EMPTY)
    weights = _hash(b"weights", chain.weights, average, square, rate)
    stepped = Chain(weights=weights, average=average, square=square, step=chain.step + 1)
    return stepped, number(average)


def loaded(saved: Chain, *, optimizer: bool) -> Chain:
    """Return the state after loading what was saved."""
    if optimizer:
        return replace(saved, gradient=None)
    return Chain(weights=saved.weights)


def number(digest: bytes) -> float:
    """Return a float that JSON and float64 carry exactly."""
    return int.from_bytes(digest[:5], "little") / 65536


def logprobs(digest: bytes, count: int) -> list[float]:
    """Return `count` values that float32 carries exactly."""
    return [-digest[index % 32] / 64 for index in range(count)]


def metrics(digest: bytes, examples: Sequence[Example]) -> dict[str, float]:
    """Return what a forward or forward_backward that answers `digest` tells of itself."""
    return {
        "loss:sum": number(digest),
        "tokens:sum": float(sum(len(one.tokens) for one in examples)),
        "loss_weight:sum": float(sum(sum(one.weights) for one in examples)),
    }


def _hash(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()
