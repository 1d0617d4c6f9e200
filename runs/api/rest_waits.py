"""REST requests that ask to wait (`?wait_s=`): held before Django sees them, which would keep a thread for each.

Wraps the Django application. It gets the request when what is waited for has ended or the time is over, and answers
it as any other. Whatever is wrong with a request is Django's to say, so such a one goes to it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl

from django.db import Error as DatabaseProblem
from pydantic import TypeAdapter, ValidationError

from runs import ids
from runs.api import waiters
from runs.api.decorators import (
    Receive,
    Scope,
    Send,
    credential_in,
    headers_of,
    in_thread,
    user_of,
    while_connected,
)
from runs.api.request_bodies import ClientLeft
from runs.api.waiters import Waiters
from runs.exceptions import MintError
from runs.models import User
from runs.schemas.waits import WaitS
from runs.services import access

_NAME: Final = "wait_s"
_FORMER_NAME: Final = "wait"
_seconds: Final = TypeAdapter[float](WaitS)
# Django opens a thread and a connection for each request: those that waited for one thing take turns when it ends.
_MAX_AT_ONCE: Final = 16
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Find = Callable[[User, Mapping[str, str]], int]


def _run(user: User, named: Mapping[str, str]) -> int:
    return access.get_run(user, named["run"]).pk


def _sample(user: User, named: Mapping[str, str]) -> int:
    return access.get_operation(user, ids.parse_request_id(named["sample"])).pk


def _version(user: User, named: Mapping[str, str]) -> int:
    return access.get_dataset_version(user, named["dataset"], int(named["number"])).pk


_WAITS: Final[tuple[tuple[re.Pattern[str], Find, Waiters], ...]] = (
    (re.compile(r"/rest/v1/runs/(?P<run>[^/\0]+)(/status)?"), _run, waiters.runs),
    (re.compile(r"/rest/v1/samples/(?P<sample>[^/\0]+)"), _sample, waiters.operations),
    (
        re.compile(r"/rest/v1/datasets/(?P<dataset>[^/\0]+)/versions/(?P<number>[0-9]{1,6})"),
        _version,
        waiters.dataset_versions,
    ),
)


class RestWaits:
    """An ASGI application that holds requests for as long as they ask to wait, and then hands them on."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._turns = asyncio.Semaphore(_MAX_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a request, if need be later."""
        wait = _wait_of(scope)
        if wait is None:
            await self._app(scope, receive, send)
            return
        try:
            await _body(receive)
            with contextlib.suppress(MintError, DatabaseProblem):
                await while_connected(wait.until_over(headers_of(scope)), receive)
        except ClientLeft:
            return
        async with self._turns:
            await self._app(scope, _after_body(receive), send)


@dataclass(frozen=True, kw_only=True)
class _Wait:
    """What a request waits for, and how long at most."""

    find: Find
    named: Mapping[str, str]
    waiters: Waiters
    seconds: float

    async def until_over(self, headers: Mapping[str, str]) -> None:
        """Return when it has ended or the time is over.

        Raises:
            NotAuthenticated: there is no key, or none that is valid.
            NotFound: there is no such thing, or not of the key's owner.
        """
        user = await user_of(credential_in(headers))
        pk = await in_thread(lambda: self.find(user, self.named))
        with self.waiters.parked(pk) as ended:
            if not await in_thread(lambda: self.waiters.ended_among([pk])):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), self.seconds)


def _wait_of(scope: Scope) -> _Wait | None:
    """Return what a request waits for; None for one that does not, or that Django refuses."""
    query = scope["query_string"]
    if scope["method"] != "GET" or not query:
        return None
    for pattern, find, held in _WAITS:
        matched = pattern.fullmatch(scope["path"])
        if matched is not None:
            names = (_NAME, _FORMER_NAME) if find is _sample else (_NAME,)
            seconds = _seconds_in(query.decode("latin-1"), names)
            named = matched.groupdict()
            return _Wait(find=find, named=named, waiters=held, seconds=seconds) if seconds else None
    return None


def _seconds_in(query: str, names: tuple[str, ...]) -> float:
    """Return for how long a request asks to wait: 0 unless that is all it asks for, and is allowed."""
    asked = parse_qsl(query, keep_blank_values=True)
    if len(asked) != 1 or asked[0][0] not in names:
        return 0.0
    try:
        return _seconds.validate_python(asked[0][1])
    except ValidationError:
        return 0.0


async def _body(receive: Receive) -> None:
    """Take a request's body, whose size and time are limited by who is asked before; nobody reads one of a GET.

    Raises:
        ClientLeft: it was cut off.
    """
    has_more = True
    while has_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        has_more = message.get("more_body", False)


def _after_body(receive: Receive) -> Receive:
    """Return a `receive` that gives an empty body before what follows a body."""
    given = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive_rest() -> dict[str, Any]:
        return given.pop() if given else await receive()

    return receive_rest
