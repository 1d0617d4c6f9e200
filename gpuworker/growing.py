"""What a worker holds for each base model, when base models come while it works already. Knows nothing of either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

Held = TypeVar("Held")


class Growing(Mapping[str, Held]):
    """One thing for each name; a name may come while other threads go through them."""

    def __init__(self, held: Mapping[str, Held]) -> None:
        self._held = dict(held)

    def __getitem__(self, name: str) -> Held:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def add(self, held: Mapping[str, Held]) -> None:
        """Hold these, too."""
        self._held = {**self._held, **held}  # anew: whoever goes through the former ones is not disturbed
