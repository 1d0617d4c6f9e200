"""Refuses what is too large or too slow before Django sees it: it keeps every body whole, whoever sends it.

Wraps the whole Django application. Nobody sends more than a little without a session or a key, only the addresses
that take a dataset's file may get a large body, and whoever stops sending is sent away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from functools import partial
from typing import Any, Final

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth import SESSION_KEY
from django.contrib.sessions.backends.db import SessionStore
from django.db import InterfaceError, OperationalError
from django.http import HttpRequest, parse_cookie

from runs.exceptions import BodyTooSlow, DiskFull, MintError, NotAuthenticated, PayloadTooLarge
from runs.rest import errors
from runs.services import blobs, keys, uploads
from runs.threads import with_connection

logger = logging.getLogger(__name__)
_TAKES_FILE: Final = re.compile(r"/rest/v1/datasets(/[^/]+/versions)?")
# What anyone may send; a sign-in takes a few hundred bytes.
OPEN_BODY_BYTES: Final = 64 << 10
# What a page's form may have: the largest holds a run's settings as YAML, or ids of some hundred rows.
PAGE_BODY_BYTES: Final = 4 << 20
# An open body is to be whole in this time; a larger one may take longer for as long as something comes.
_TIMEOUT_S: Final = 30.0
# A file is measured against the free space again whenever so much of it has come.
_LOOK_EVERY_BYTES: Final = 64 << 20
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class BodyGuard:
    """An ASGI application that hands on requests whose bodies are not too large and arrive in time."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hand on a request, or refuse it."""
        answer = _Answer(send)
        try:
            limit = await _limit(scope)
            with blobs.room():
                await self._app(scope, _Body(receive, limit, is_file=_takes_file(scope)).receive, answer.send)
        except _Refusal as refusal:
            await _send(refusal.error, send)
        except DiskFull as error:
            if answer.has_begun:
                raise
            await _send(error, send)


class _Refusal(Exception):
    """Wraps the answer, so that no error of the application's is taken for one."""

    def __init__(self, error: MintError) -> None:
        super().__init__(error)
        self.error = error


class _Answer:
    """What the application answers, and whether it has begun to."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False

    async def send(self, message: Message) -> None:
        self.has_begun = True
        await self._send(message)


class _Body:
    """A request's body on its way in."""

    def __init__(self, receive: Receive, limit: int, *, is_file: bool) -> None:
        self._receive = receive
        self._limit = limit
        self._num_bytes = 0
        self._look_at_bytes: float = _LOOK_EVERY_BYTES if is_file else math.inf
        self._is_whole = False
        self._began_at = time.monotonic()

    async def receive(self) -> Message:
        """Return the next part; what comes after the last one, that the client leaves, has no limit."""
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout(self._patience_s()):
                message = await self._receive()
        except TimeoutError:
            raise _Refusal(BodyTooSlow(f"the body did not go on within {_TIMEOUT_S:g} s")) from None
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._limit:
            raise _too_large(self._limit)
        if self._num_bytes >= self._look_at_bytes:
            self._look_at_bytes = self._num_bytes + _LOOK_EVERY_BYTES
            with _refusing():
                await _check_space(self._num_bytes, here_bytes=self._num_bytes)
        self._is_whole = not message.get("more_body", False)
        return message

    def _patience_s(self) -> float:
        is_open = self._limit <= OPEN_BODY_BYTES
        return max(self._began_at + _TIMEOUT_S - time.monotonic(), 0.0) if is_open else _TIMEOUT_S


async def _limit(scope: Message) -> int:
    """Return how many bytes a request's body may have.

    Raises:
        _Refusal: they are more, or more than this sender may send.
    """
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    length = headers.get(b"content-length", "")
    size_bytes = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
    has_none = size_bytes is None and b"transfer-encoding" not in headers and not length
    limit = OPEN_BODY_BYTES
    if not has_none and (size_bytes is None or size_bytes > limit):
        limit = await _limit_of_known(scope, headers, size_bytes)
    limit = min(limit, settings.MAX_UPLOAD_BYTES if _takes_file(scope) else settings.MAX_BODY_BYTES)
    if size_bytes is not None and size_bytes > limit:
        raise _too_large(limit)
    return limit


def _takes_file(scope: Message) -> bool:
    return scope["method"] == "POST" and _TAKES_FILE.fullmatch(scope["path"]) is not None


async def _limit_of_known(scope: Message, headers: dict[bytes, str], size_bytes: int | None) -> int:
    """Return the limit for a body that is large, or whose size is not told: it depends on who sends it."""
    with _refusing():
        if not scope["path"].startswith("/rest/"):
            is_known = await sync_to_async(with_connection)(partial(_has_session, headers))
            return PAGE_BODY_BYTES if is_known else OPEN_BODY_BYTES
        await _authenticate(headers)
        if not _takes_file(scope):
            return settings.MAX_BODY_BYTES
        least_bytes = size_bytes or 1
        if least_bytes <= settings.MAX_UPLOAD_BYTES:
            await _check_space(least_bytes)
    return settings.MAX_UPLOAD_BYTES


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (NotAuthenticated, DiskFull) as error:
        raise _Refusal(error) from None
    except (OperationalError, InterfaceError) as error:
        logger.warning("the database did not answer: %s", error)
        raise _Refusal(errors.Unavailable()) from None


async def _check_space(size_bytes: int, *, here_bytes: int = 0) -> None:
    check = partial(uploads.check_space, size_bytes, here_bytes=here_bytes)
    await sync_to_async(with_connection)(check)


async def _authenticate(headers: dict[bytes, str]) -> None:
    credential = keys.sent_in(headers.get(b"x-api-key", ""), headers.get(b"authorization", ""))
    if not credential:
        raise NotAuthenticated("a key is needed")
    if keys.cached_user(credential) is None:
        await sync_to_async(with_connection)(partial(keys.authenticate, credential))


def _has_session(headers: dict[bytes, str]) -> bool:
    key = parse_cookie(headers.get(b"cookie", "")).get(settings.SESSION_COOKIE_NAME, "")
    return "\0" not in key and SESSION_KEY in SessionStore(key)


def _too_large(limit: int) -> _Refusal:
    return _Refusal(PayloadTooLarge(f"a body has at most {limit} bytes here"))


async def _send(error: MintError, send: Send) -> None:
    request = HttpRequest()
    request.META["mintweb.request_id"] = uuid.uuid4().hex[:16]
    response = errors.reply(request, error)
    response["X-Request-Id"] = errors.request_id_of(request)
    response["Content-Length"] = str(len(response.content))
    if isinstance(error, BodyTooSlow):
        response["Connection"] = "close"
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in response.items()]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": response.content})
