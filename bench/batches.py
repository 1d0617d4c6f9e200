"""The token sequences that every candidate gets: the same on both sides, from the batch's own description.

Plain Python: the client environments import it too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Batch:
    """So many sequences with lengths from `shortest` to `longest`, of random tokens.

    The lengths are evenly spread, or denser at the short end where `skew` is above 1, as those of most datasets are.
    """

    num_sequences: int
    shortest: int
    longest: int
    seed: int
    vocab_size: int
    skew: float = 1.0

    @property
    def lengths(self) -> list[int]:
        """Input tokens of each sequence, in a random order."""
        steps = max(self.num_sequences - 1, 1)
        spread = self.longest - self.shortest
        lengths = [
            self.shortest + round(spread * (i / steps) ** self.skew) for i in range(self.num_sequences)
        ]
        random.Random(self.seed).shuffle(lengths)
        return lengths

    @property
    def num_tokens(self) -> int:
        """Input tokens in all."""
        return sum(self.lengths)

    @property
    def padding_ratio(self) -> float:
        """Tokens of the padded rectangle over real tokens."""
        return self.num_sequences * self.longest / self.num_tokens

    def sequences(self) -> list[list[int]]:
        """Return the sequences, each one token longer than its input: the last is only a target."""
        rng = random.Random(self.seed)
        return [[rng.randrange(self.vocab_size) for _ in range(n + 1)] for n in self.lengths]


def batch(description: dict[str, Any]) -> Batch:
    """Return the batch of a description that crossed a process border."""
    return Batch(**description)
