"""A file to write to whose bytes are sent on as they come."""

from __future__ import annotations

import io
from typing import Any


class Sink(io.RawIOBase):
    """Cannot go back; hands on what was written to it."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        """Say that it takes bytes."""
        return True

    def write(self, data: Any) -> int:
        """Keep bytes until they are taken."""
        part = bytes(data)
        self._parts.append(part)
        return len(part)

    def take(self) -> bytes:
        """Return what came since the last call."""
        taken, self._parts = b"".join(self._parts), []
        return taken
