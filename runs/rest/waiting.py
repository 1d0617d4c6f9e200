"""Requests that wait for an operation: one look at the database a moment for all of them together."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import Final

from django.db import DatabaseError, close_old_connections, connection

from runs.services import operations

logger = logging.getLogger(__name__)

MAX_WAIT_S: Final = 30
# Each waits in a thread of its own; beyond these a request is answered at once and asks again.
_MAX_WAITING: Final = 64
_LOOK_S: Final = 0.1


def wait_for(operation_pk: int, seconds: float) -> None:
    """Return when the operation has its answer, or when the time is over.

    The caller's database connection is closed meanwhile: waiting requests hold none.
    """
    connection.close()
    _desk.wait(operation_pk, seconds)


class _Desk:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: Counter[int] = Counter()
        self._finished: set[int] = set()
        self._thread: threading.Thread | None = None

    def wait(self, operation_pk: int, seconds: float) -> None:
        with self._changed:
            if self._waiting.total() >= _MAX_WAITING:
                return
            self._waiting[operation_pk] += 1
            self._start()
            self._changed.notify_all()
            self._changed.wait_for(lambda: operation_pk in self._finished, seconds)
            self._waiting[operation_pk] -= 1
            if not self._waiting[operation_pk]:
                del self._waiting[operation_pk]
                self._finished.discard(operation_pk)

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._look, name="rest-waiting", daemon=True)
            self._thread.start()

    def _look(self) -> None:
        """Look until nobody waits any more; the next one who does starts another thread."""
        try:
            while True:
                with self._changed:
                    wanted = list(self._waiting)
                    if not wanted:
                        self._thread = None
                        return
                finished = self._finished_among(wanted)
                with self._changed:
                    self._finished.update(pk for pk in finished if pk in self._waiting)
                    self._changed.notify_all()
                time.sleep(_LOOK_S)
        finally:
            connection.close()

    @staticmethod
    def _finished_among(wanted: list[int]) -> list[int]:
        try:
            return operations.finished_among(wanted)
        except DatabaseError as error:
            logger.warning("waiting requests could not be looked after: %s", error)
            close_old_connections()
            return []


_desk = _Desk()
