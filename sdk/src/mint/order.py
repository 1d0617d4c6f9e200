"""The order of submissions of one client."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future as ConcurrentFuture
from typing import Any

from .future import pending_future, relay

Submission = Callable[[], ConcurrentFuture[Any]]


def _unchanged(result: Any) -> Any:
    return result


class SubmissionOrder:
    """Passes submissions on in the order of the calls.

    Normally at once. While one is held (it takes its sequence numbers later, or the session is
    still being opened), the following ones queue up behind it, and their callers do not wait.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: deque[tuple[Submission, ConcurrentFuture[Any]]] = deque()
        self._held = False

    def submit(self, submission: Submission) -> ConcurrentFuture[Any]:
        """Pass the submission on now, or after those that are waiting."""
        with self._lock:
            if not self._held:
                return submission()
            target = pending_future()
            self._waiting.append((submission, target))
            return target

    def hold(self) -> None:
        """Keep all later submissions back until `release`."""
        with self._lock:
            self._held = True

    def release(self) -> None:
        """Pass on what has been waiting, up to the next submission that holds."""
        with self._lock:
            self._held = False
            while self._waiting and not self._held:
                submission, target = self._waiting.popleft()
                try:
                    relay(submission(), target, _unchanged)
                except Exception as error:  # noqa: BLE001 - the caller has only the future left
                    target.set_exception(error)
