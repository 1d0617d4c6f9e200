"""Slows down guessing of passwords: after a number of wrong tries a name is locked for its address.

Counts in Django's cache, so in this process until a shared cache is configured.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Final

from django.core.cache import cache

MAX_TRIES: Final = 8
MAX_TRIES_OF_ADDRESS: Final = 60
LOCK_S: Final = 600


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try to sign in."""

    name: str
    address: str

    def wait_s(self) -> float:
        """Return how long to wait before the next try counts, 0 for not at all."""
        return max((self._wait_of(key, limit) for key, limit in self._limits()), default=0.0)

    def note_failure(self) -> None:
        """Count a wrong password."""
        for key, _ in self._limits():
            tries, _ = cache.get(key, (0, 0.0))
            cache.set(key, (tries + 1, time.time() + LOCK_S), LOCK_S)

    def forget(self) -> None:
        """Forget the wrong tries of this name from this address."""
        cache.delete(self._limits()[0][0])

    def _limits(self) -> list[tuple[str, int]]:
        name = hashlib.sha256(f"{self.address}\0{self.name.lower()}".encode()).hexdigest()
        address = hashlib.sha256(self.address.encode()).hexdigest()
        return [(f"sign-in:{name}", MAX_TRIES), (f"sign-in-from:{address}", MAX_TRIES_OF_ADDRESS)]

    @staticmethod
    def _wait_of(key: str, limit: int) -> float:
        tries, until = cache.get(key, (0, 0.0))
        return max(until - time.time(), 0.0) if tries >= limit else 0.0
