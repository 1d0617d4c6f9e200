"""How much of the time the device had something to do, and whether it still gets anything done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class BusyMeter:
    """Adds up busy time; `share` gives the part of the time since it was last asked.

    The compute stage beats whenever something is done; `stuck_s` is read by the lease's thread.
    """

    def __init__(self) -> None:
        self._busy_s = 0.0
        self._asked_at = time.monotonic()
        self._moved_at: float | None = None

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the time inside as busy."""
        started_at = self._moved_at = time.monotonic()
        try:
            yield
        finally:
            self._moved_at = None
            self._busy_s += time.monotonic() - started_at

    def beat(self) -> None:
        """Note that something was done."""
        if self._moved_at is not None:
            self._moved_at = time.monotonic()

    def stuck_s(self) -> float:
        """Return for how long the device has been at one thing; 0 when it has nothing to do."""
        moved_at = self._moved_at
        return 0.0 if moved_at is None else time.monotonic() - moved_at

    def share(self) -> float:
        """Return a number from 0 to 1 and begin anew."""
        now = time.monotonic()
        share = min(self._busy_s / max(now - self._asked_at, 1e-9), 1.0)
        self._busy_s, self._asked_at = 0.0, now
        return share
