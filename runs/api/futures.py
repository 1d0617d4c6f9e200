"""Waiting for an operation's answer.

A client polls again at once when it hears "not yet", so the request is held here until the operation
is finished or nearly too long for the client's patience. PostgreSQL's NOTIFY wakes it; a look at all
waited-for rows twice a second makes up for lost notifications.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

import psycopg
from django.db import Error as DatabaseProblem

from runs import events, ids
from runs.api.decorators import ApiRequest, Reply, in_thread, json_reply
from runs.exceptions import ResultExpired
from runs.models import Operation
from runs.schemas import requests, responses, results
from runs.schemas.parsing import validate
from runs.services import access, operations, waiting

logger = logging.getLogger(__name__)

_LOOK_S: Final = 0.5


async def retrieve_future(request: ApiRequest) -> Reply:
    """Answer with the result, the failure, or 408 "not yet" after holding the request."""
    body = validate(requests.RetrieveFuture, request.body)
    pk = ids.parse_request_id(body.request_id)
    with _waiters.parked(pk) as finished:
        operation = await in_thread(lambda: access.get_operation(request.user, pk))
        if operation.state == Operation.State.QUEUED:
            await _wait(finished, request.hold_s)
            operation = await in_thread(lambda: access.get_operation(request.user, pk))
    if operation.state == Operation.State.QUEUED:
        return await in_thread(lambda: _not_yet(operation))
    return _answer(operation, accepts_proto=request.accepts_proto, accepts_json=request.accepts_json)


async def _wait(finished: asyncio.Event, hold_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(finished.wait(), hold_s)


def _not_yet(operation: Operation) -> Reply:
    reason = waiting.reason_of(operation)
    state = "paused_capacity" if reason else "active"
    content = responses.try_again(operation.request_id, state, reason=reason or None)  # type: ignore[arg-type]
    return json_reply(dict(content), status=408)


def _answer(operation: Operation, *, accepts_proto: bool, accepts_json: bool) -> Reply:
    if operation.state == Operation.State.FAILED:
        return json_reply({"error": operation.error, "category": operation.error_category or "unknown"})
    if operation.result is None:
        raise ResultExpired
    body = bytes(operation.result)
    if not operation.result_is_proto:
        return Reply(body=body)
    is_sample = operation.kind == Operation.Kind.SAMPLE
    is_misread = accepts_json and not is_sample and results.has_mixed_shapes(body)
    if accepts_proto and not is_misread:
        return Reply(body=body, content_type="application/x-protobuf")
    render = results.render_sample_json if is_sample else results.render_forward_backward_json
    return Reply(body=render(body))


class _Waiters:
    """The parked polls of this process, by operation."""

    def __init__(self) -> None:
        self._events: dict[int, set[asyncio.Event]] = defaultdict(set)
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def parked(self, operation_pk: int) -> Iterator[asyncio.Event]:
        """Give an event that is set when the operation is finished; enter before reading the row."""
        self._start()
        event = asyncio.Event()
        self._events[operation_pk].add(event)
        try:
            yield event
        finally:
            self._events[operation_pk].discard(event)
            if not self._events[operation_pk]:
                del self._events[operation_pk]

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._tasks = [loop.create_task(self._listen()), loop.create_task(self._look())]

    def _wake(self, operation_pks: list[int]) -> None:
        for pk in operation_pks:
            for event in self._events.get(pk, ()):
                event.set()

    async def _listen(self) -> None:
        while True:
            try:
                direct = await in_thread(events.direct_parameters)
                async with await psycopg.AsyncConnection.connect(**direct, autocommit=True) as held:
                    await held.execute(f"LISTEN {events.DONE_CHANNEL}")
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
                    self._wake(await in_thread(lambda: operations.finished_among(waited_for)))  # noqa: B023
                except DatabaseProblem as error:
                    logger.warning("waiting requests could not be looked after: %s", error)


_waiters = _Waiters()
