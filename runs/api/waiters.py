"""What requests of this process wait for: one look at the database a moment for all of them together.

A waiting request is an event in a dict: it keeps no thread and no database connection. PostgreSQL's NOTIFY wakes
those that wait for an operation; a look at all waited-for rows twice a second makes up for lost notifications, and is
all there is for what lasts long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Final

import psycopg
from django.db import Error as DatabaseProblem

from runs import events
from runs.api.decorators import in_thread
from runs.services import dataset_checks, training_runs
from runs.services import operations as operation_log

logger = logging.getLogger(__name__)

_LOOK_S: Final = 0.5


class Waiters:
    """The waiting requests of this process, by the number of what they wait for.

    Args:
        ended_among: returns those of some numbers that are not to be waited for any more.
        channel: where PostgreSQL tells of the ones that have just ended, if it does.
    """

    def __init__(self, ended_among: Callable[[list[int]], list[int]], *, channel: str = "") -> None:
        self.ended_among = ended_among
        self._channel = channel
        self._events: dict[int, set[asyncio.Event]] = defaultdict(set)
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def parked(self, pk: int) -> Iterator[asyncio.Event]:
        """Give an event that is set when it has ended; enter before reading the row."""
        self._start()
        event = asyncio.Event()
        self._events[pk].add(event)
        try:
            yield event
        finally:
            self._events[pk].discard(event)
            if not self._events[pk]:
                del self._events[pk]

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._tasks = [loop.create_task(self._look())]
            if self._channel:
                self._tasks.append(loop.create_task(self._listen()))

    def _wake(self, pks: list[int]) -> None:
        for pk in pks:
            for event in self._events.get(pk, ()):
                event.set()

    async def _listen(self) -> None:
        while True:
            try:
                direct = await in_thread(events.direct_parameters)
                async with await psycopg.AsyncConnection.connect(**direct, autocommit=True) as held:
                    await held.execute(f"LISTEN {self._channel}")
                    async for notice in held.notifies():
                        self._wake(json.loads(notice.payload))
            except (DatabaseProblem, psycopg.Error) as error:
                logger.warning("results arrive late, the database does not answer: %s", error)
                await asyncio.sleep(1.0)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            waited_for = list(self._events)
            if waited_for:
                try:
                    self._wake(await in_thread(lambda: self.ended_among(waited_for)))  # noqa: B023
                except DatabaseProblem as error:
                    logger.warning("waiting requests could not be looked after: %s", error)


operations: Final = Waiters(operation_log.finished_among, channel=events.DONE_CHANNEL)
runs: Final = Waiters(training_runs.over_among)
dataset_versions: Final = Waiters(dataset_checks.checked_among)
