"""The process that hosts the recipe loop: a Celery worker of the queue `recipes`, driven by rows.

The loop runs in a thread of its own. It needs no message to go on: NOTIFY wakes it when a run is
started or steered, and it looks by itself every two seconds.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Final

import psycopg
from celery.signals import worker_ready, worker_shutdown
from django.db import Error as DatabaseProblem

from runs import events
from runs.recipes.loop import RecipeLoop
from runs.threads import database_thread, until_reachable

logger = logging.getLogger(__name__)

QUEUE: Final = "recipes"
TURN_S: Final = 0.1
IDLE_S: Final = 2.0


class RecipeProcess:
    """Turns the loop for as long as the process lives."""

    def __init__(self) -> None:
        self._loop = RecipeLoop()
        self._bell = threading.Event()
        self._stopping = threading.Event()
        self._threads = [database_thread("recipes", self._run), database_thread("recipes-bell", self._listen)]

    def start(self) -> None:
        """Begin to look after recipes."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the running turn end, and what is being tokenised: the process ends after its threads."""
        self._stopping.set()
        self._bell.set()
        self._threads[0].join()
        self._loop.materials.keep_only([])

    def _run(self) -> None:
        while not self._stopping.is_set():
            is_busy = until_reachable(self._loop.turn)
            if is_busy:
                self._stopping.wait(TURN_S)
            else:
                self._bell.wait(IDLE_S)
            self._bell.clear()

    def _listen(self) -> None:
        while not self._stopping.is_set():
            try:
                with psycopg.connect(**events.direct_parameters(), autocommit=True) as held:
                    held.execute(f"LISTEN {events.RECIPES_CHANNEL}")
                    while not self._stopping.is_set():
                        for _ in held.notifies(timeout=IDLE_S, stop_after=1):
                            self._bell.set()
            except (DatabaseProblem, psycopg.Error) as error:
                logger.warning("recipes start late, the database does not answer: %s", error)
                self._stopping.wait(IDLE_S)


_process: RecipeProcess | None = None


@worker_ready.connect
def start(sender: Any, **_: Any) -> None:
    """Begin, in the process that serves the recipes queue only."""
    global _process
    if QUEUE in sender.app.amqp.queues.consume_from:
        _process = RecipeProcess()
        _process.start()


@worker_shutdown.connect
def stop(**_: Any) -> None:
    """End between two turns."""
    if _process is not None:
        _process.stop()
