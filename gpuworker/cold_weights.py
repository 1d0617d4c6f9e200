"""Weights of sampling sessions on their way from storage, read by a thread of their own while the device computes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import Final, TypeAlias

from gpuworker import snapshots
from gpuworker.engine.adapters import AdapterState
from gpuworker.seats import PutOff
from gpuworker.snapshots import StorageError

logger = logging.getLogger(__name__)

Found: TypeAlias = AdapterState | Exception
# Read and not yet on the device: their memory is not counted anywhere.
_READ_AHEAD: Final = 4
_POLL_S: Final = 0.1
_STOP_S: Final = 5.0


class ColdWeights:
    """Reads one folder after another; what cannot be read just now is tried again, what is missing or torn is not.

    Args:
        unwritten: returns the folders that a save is still writing, which are read once they are there.
        on_read: called when `pop` has something.
    """

    def __init__(self, *, unwritten: Callable[[], Collection[str]], on_read: Callable[[], None]) -> None:
        self._unwritten = unwritten
        self._on_read = on_read
        self._changed = threading.Condition()
        self._wanted: dict[str, PutOff] = {}
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
                self._wanted.setdefault(directory, PutOff())
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
                if isinstance(found, StorageError):
                    logger.warning("weights are read again later: %s", found)
                    self._wanted[directory].again()
                    continue
                del self._wanted[directory]
                self._read[directory] = found
            self._on_read()

    def _next(self) -> str | None:
        """Wait for a folder to read, and return it; None when there will be none."""
        with self._changed:
            while not self._is_stopped:
                due = [directory for directory, put_off in self._wanted.items() if put_off.is_due]
                unwritten = self._unwritten() if due else ()
                if len(self._read) < _READ_AHEAD:
                    for directory in due:
                        if directory not in unwritten:
                            return directory
                self._changed.wait(_POLL_S if self._wanted else None)
        return None


def _find(directory: str) -> Found:
    try:
        return snapshots.fetch(directory)
    except Exception as error:  # noqa: BLE001 - whoever wants the weights is told, and the thread goes on
        return error
