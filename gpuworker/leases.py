"""The worker's signs of life: an advisory lock held by one connection, and a lease renewed from here.

Both end when the device is stuck: a worker that only looks alive would keep its runs from all others.
A renewal that hangs, as across a network that swallows everything, ends the process: its lease has run out.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import psycopg
from django.db import Error as DatabaseFailure
from django.db import close_old_connections

from runs import events
from runs.models import Worker
from runs.services import workers
from runs.threads import database_thread

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_MS: Final = 5000
HUNG_S: Final = 2 * workers.LEASE_S
# A renewal that is so late was held up by more than a busy machine.
_BREAK_S: Final = 2.5 * workers.HEARTBEAT_S


class Lease:
    """Keeps one registered worker alive until `stop`, or until it finds that it was declared dead."""

    def __init__(
        self,
        worker: Worker,
        *,
        busy_share: Callable[[], float],
        is_stuck: Callable[[], bool],
        on_lost: Callable[[], None],
        on_stuck: Callable[[], None],
        on_hung: Callable[[], None],
        samplers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._worker = worker
        self._samplers = samplers
        self._busy_share = busy_share
        self._is_stuck = is_stuck
        self._on_lost = on_lost
        self._on_stuck = on_stuck
        self._on_hung = on_hung
        self._stopping = threading.Event()
        self._heard_at = time.monotonic()
        self._heard_since = -math.inf
        self._lock_connection = self._lock()
        self._thread = database_thread("lease", self._loop)
        self._thread.start()

    @property
    def is_steady(self) -> bool:
        """Whether the database answers for so long without a break that other workers must have found it again, too.

        Else it says of none of them whether it lives.
        """
        return time.monotonic() - self._heard_at < _BREAK_S and self.heard_s > workers.RETURN_GRACE_S

    @property
    def heard_s(self) -> float:
        """For how long the database has answered without a break; negative while it does not."""
        return time.monotonic() - self._heard_since

    def stop(self) -> None:
        """End the renewal and free the lock."""
        self._stopping.set()
        self._thread.join()
        self._lock_connection.close()

    def _lock(self) -> psycopg.Connection[tuple[object, ...]]:
        held: psycopg.Connection[tuple[object, ...]] = psycopg.connect(
            **events.direct_parameters(),
            autocommit=True,
            options=f"-c lock_timeout={LOCK_TIMEOUT_MS}",
        )
        held.execute("SELECT pg_advisory_lock(%s, %s)", [workers.LOCK_CLASS, self._worker.pk])
        return held

    def _loop(self) -> None:
        while not self._stopping.wait(workers.HEARTBEAT_S):
            if self._is_stuck():
                self._on_stuck()
                return
            with self._limited():
                is_alive = self._renew()
            if not is_alive:
                logger.warning("worker %s was declared dead meanwhile; its runs start anew", self._worker.pk)
                self._on_lost()
                return

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Call `on_hung` when what is inside takes too long."""
        limit = threading.Timer(HUNG_S, self._on_hung)
        limit.daemon = True
        limit.start()
        try:
            yield
        finally:
            limit.cancel()

    def _renew(self) -> bool:
        """Return whether the worker still counts as alive; while the database is away nobody can say otherwise."""
        try:
            close_old_connections()
            self._lock_connection.execute("SELECT 1")
            is_alive = workers.renew(self._worker, busy_share=self._busy_share(), samplers=self._samplers())
        except (DatabaseFailure, psycopg.Error) as error:
            logger.warning("the lease could not be renewed: %s", error)
            self._heard_since = math.inf
            self._reconnect()
            return True
        self._note_heard()
        return is_alive

    def _note_heard(self) -> None:
        now = time.monotonic()
        if self._heard_since == math.inf or now - self._heard_at >= _BREAK_S:
            self._heard_since = now
        self._heard_at = now

    def _reconnect(self) -> None:
        self._lock_connection.close()
        try:
            self._lock_connection = self._lock()
        except psycopg.Error as error:
            logger.warning("the database is still not reachable: %s", error)
