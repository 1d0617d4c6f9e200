"""How much of the time the device had something to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class BusyMeter:
    """Adds up busy time; `share` gives the part of the time since it was last asked."""

    def __init__(self) -> None:
        self._busy_s = 0.0
        self._asked_at = time.monotonic()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the time inside as busy."""
        started_at = time.monotonic()
        try:
            yield
        finally:
            self._busy_s += time.monotonic() - started_at

    def share(self) -> float:
        """Return a number from 0 to 1 and begin anew."""
        now = time.monotonic()
        share = min(self._busy_s / max(now - self._asked_at, 1e-9), 1.0)
        self._busy_s, self._asked_at = 0.0, now
        return share
