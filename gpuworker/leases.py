"""The worker's signs of life: an advisory lock held by one connection, and a lease renewed from here.

Both end when the device is stuck: a worker that only looks alive would keep its runs from all others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import psycopg
from django.db import Error as DatabaseFailure
from django.db import close_old_connections

from runs import events
from runs.models import Worker
from runs.services import workers
from runs.threads import database_thread

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_MS = 5000


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
    ) -> None:
        self._worker = worker
        self._busy_share = busy_share
        self._is_stuck = is_stuck
        self._on_lost = on_lost
        self._on_stuck = on_stuck
        self._stopping = threading.Event()
        self._lock_connection = self._lock()
        self._thread = database_thread("lease", self._loop)
        self._thread.start()

    def stop(self) -> None:
        """End the renewal and free the lock."""
        self._stopping.set()
        self._thread.join()
        self._lock_connection.close()

    def _lock(self) -> psycopg.Connection[tuple[object, ...]]:
        held: psycopg.Connection[tuple[object, ...]] = psycopg.connect(
            **events.direct_parameters(),
            autocommit=True,
            keepalives_idle=5,
            keepalives_interval=2,
            keepalives_count=3,
            connect_timeout=5,
            options=f"-c lock_timeout={LOCK_TIMEOUT_MS}",
        )
        held.execute("SELECT pg_advisory_lock(%s, %s)", [workers.LOCK_CLASS, self._worker.pk])
        return held

    def _loop(self) -> None:
        while not self._stopping.wait(workers.HEARTBEAT_S):
            if self._is_stuck():
                self._on_stuck()
                return
            try:
                close_old_connections()
                self._lock_connection.execute("SELECT 1")
                if not workers.renew(self._worker, busy_share=self._busy_share()):
                    logger.warning(
                        "worker %s was declared dead meanwhile; its runs start anew", self._worker.pk
                    )
                    self._on_lost()
                    return
            except (DatabaseFailure, psycopg.Error) as error:
                logger.warning("the lease could not be renewed: %s", error)
                self._reconnect()

    def _reconnect(self) -> None:
        self._lock_connection.close()
        try:
            self._lock_connection = self._lock()
        except psycopg.Error as error:
            logger.warning("the database is still not reachable: %s", error)
