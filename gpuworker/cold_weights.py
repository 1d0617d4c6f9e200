"""Weights of sampling sessions on their way from storage, read by a thread of their own while the device computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Final, TypeAlias

from gpuworker import snapshots
from gpuworker.engine.adapters import AdapterState

Found: TypeAlias = AdapterState | Exception
# Read and not yet on the device: their memory is not counted anywhere.
_READ_AHEAD: Final = 4
_POLL_S: Final = 0.1
_STOP_S: Final = 5.0


class ColdWeights:
    """Reads one folder after another.

    Args:
        unwritten: returns the folders that a save is still writing, which are read once they are there.
        on_read: called when `pop` has something.
    """

    def __init__(self, *, unwritten: Callable[[], Collection[str]], on_read: Callable[[], None]) -> None:
        self._unwritten = unwritten
        self._on_read = on_read
        self._changed = threading.Condition()
        self._wanted: dict[str, None] = {}  # in the order of asking
        self._read: dict[str, Found] = {}
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    @property
    def has_read(self) -> bool:
        """Whether `pop` has something."""
        return bool(self._read)

    def want(self, directory: str) -> None:
        """Have a folder read, unless it is about to be."""
        with self._changed:
            if directory not in self._read:
                self._wanted[directory] = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cold-weights", daemon=True)
                self._thread.start()
            self._changed.notify()

    def pop(self) -> dict[str, Found]:
        """Return what was read since the last call, by folder: the weights, or why there are none."""
        with self._changed:
            read, self._read = self._read, {}
            self._changed.notify()
        return read

    def stop(self) -> None:
        """Read nothing more."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_STOP_S)

    def _run(self) -> None:
        while (directory := self._next()) is not None:
            found = _find(directory)
            with self._changed:
                del self._wanted[directory]
                self._read[directory] = found
            self._on_read()

    def _next(self) -> str | None:
        """Wait for a folder to read, and return it; None when there will be none."""
        with self._changed:
            while not self._is_stopped:
                unwritten = self._unwritten() if self._wanted else ()
                written = next((one for one in self._wanted if one not in unwritten), None)
                if written is not None and len(self._read) < _READ_AHEAD:
                    return written
                self._changed.wait(_POLL_S if self._wanted else None)
        return None


def _find(directory: str) -> Found:
    try:
        return snapshots.fetch(directory)
    except Exception as error:  # noqa: BLE001 - whoever wants the weights is told, and the thread goes on
        return error
