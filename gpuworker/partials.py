"""Unfinished samples on their way to open pages, from a thread that the compute stage never waits for.

What is shown here is no truth: the result in the row replaces it, so anything may be lost. The same
thread notices samples that ended elsewhere (a person stopped them), so that they are not drawn to the end.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Collection
from typing import Any, Final

import redis.exceptions
from channels.layers import get_channel_layer
from django.db import DatabaseError, InterfaceError, close_old_connections, connections

from runs import events
from runs.events import SamplePartial
from runs.services import operations

logger = logging.getLogger(__name__)

_CHECK_S: Final = 0.5
_IDLE_S: Final = 5.0
_MAX_WAITING: Final = 1000
_STOP_S: Final = 5.0


class Partials:
    """Sends what it is given when it can; the newest messages push out the oldest."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, SamplePartial]] = deque(maxlen=_MAX_WAITING)
        self._open: set[int] = set()
        self._ended: set[int] = set()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def open(self, operation_pk: int) -> None:
        """Begin to look whether a sample ends elsewhere."""
        with self._wake:
            self._open.add(operation_pk)
            self._begin()

    def put(self, sampling_session_pk: int, operation_pk: int, start: int, tokens: list[int]) -> None:
        """Show tokens of an unfinished sample."""
        self._put(sampling_session_pk, operation_pk, start, tokens, is_last=False)

    def close(self, sampling_session_pk: int, operation_pk: int) -> None:
        """Tell that a sample has its answer, which is about to be committed."""
        with self._wake:
            self._open.discard(operation_pk)
            self._ended.discard(operation_pk)
        self._put(sampling_session_pk, operation_pk, 0, [], is_last=True)

    def pop_ended(self) -> Collection[int]:
        """Return the samples that ended elsewhere since the last call."""
        if not self._ended:
            return ()
        with self._wake:
            ended, self._ended = self._ended, set()
        return ended

    def stop(self) -> None:
        """Look and send no more."""
        with self._wake:
            self._is_stopped = True
            thread = self._thread
            self._wake.notify()
        if thread is not None:
            thread.join(_STOP_S)

    def _put(
        self, sampling_session_pk: int, operation_pk: int, start: int, tokens: list[int], *, is_last: bool
    ) -> None:
        message = SamplePartial(
            type="sample.partial", operation=operation_pk, start=start, tokens=tokens, is_last=is_last
        )
        with self._wake:
            self._waiting.append((sampling_session_pk, message))
            self._begin()

    def _begin(self) -> None:
        """Wake the thread; called with the lock held."""
        if self._is_stopped:
            return
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="partials", daemon=True)
            self._thread.start()
        self._wake.notify()

    def _run(self) -> None:
        try:
            # One event loop for the life of the thread: the layer keeps a Redis connection per loop.
            with asyncio.Runner() as runner:
                self._loop(runner)
        finally:
            connections.close_all()

    def _loop(self, runner: asyncio.Runner) -> None:
        checked_at = time.monotonic()
        while True:
            with self._wake:
                if self._is_stopped:
                    return
                if (
                    not self._waiting
                    and not self._wake.wait(_CHECK_S if self._open else _IDLE_S)
                    and not self._open
                ):
                    self._thread = None
                    return
                messages = list(self._waiting)
                self._waiting.clear()
                watched = set(self._open)
            if messages:
                runner.run(_send(messages))
            if watched and time.monotonic() - checked_at >= _CHECK_S:
                checked_at = time.monotonic()
                self._look(watched)

    def _look(self, watched: set[int]) -> None:
        try:
            close_old_connections()
            ended = operations.finished_among(list(watched))
        except (DatabaseError, InterfaceError) as error:
            logger.info("nobody can tell which samples were stopped: %s", error)
            return
        with self._wake:
            self._ended.update(set(ended) & self._open)


async def _send(messages: list[tuple[int, SamplePartial]]) -> None:
    layer: Any = get_channel_layer()
    try:
        for sampling_session_pk, message in messages:
            await layer.group_send(events.sampling_group(sampling_session_pk), message)
    except (OSError, redis.exceptions.RedisError) as error:
        logger.info("unfinished samples are not shown: %s", error)
