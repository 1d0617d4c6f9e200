"""Refuses what is too large before Django sees it: it writes every body to a temporary file, whoever sends it.

Wraps the whole Django application. Only the addresses that take a dataset's file may get a large body, and
only from someone with a key.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any, Final

from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import InterfaceError, OperationalError
from django.http import HttpRequest

from runs.exceptions import MintError, NotAuthenticated, PayloadTooLarge
from runs.rest import errors
from runs.services import keys
from runs.threads import with_connection

logger = logging.getLogger(__name__)
_TAKES_FILE: Final = re.compile(r"/rest/v1/datasets(/[^/]+/versions)?")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class BodyGuard:
    """An ASGI application that hands on requests whose bodies are not too large."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hand on a request, or refuse it."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        length = headers.get(b"content-length", "")
        size_bytes = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
        try:
            limit = settings.MAX_BODY_BYTES
            if size_bytes is None or size_bytes > limit:
                limit = await _limit(scope, headers)
            if size_bytes is not None and size_bytes > limit:
                raise _too_large(limit)
            await self._app(scope, _counted(receive, limit), send)
        except _Refusal as refusal:
            await _send(refusal.error, send)


class _Refusal(Exception):
    """Wraps the answer, so that no error of the application's is taken for one."""

    def __init__(self, error: MintError) -> None:
        super().__init__(error)
        self.error = error


async def _limit(scope: Message, headers: dict[bytes, str]) -> int:
    """Return how many bytes a request may have whose size is large or not told."""
    is_told = b"content-length" in headers or b"transfer-encoding" in headers
    if not is_told or scope["method"] != "POST" or not _TAKES_FILE.fullmatch(scope["path"]):
        return settings.MAX_BODY_BYTES
    scheme, _, token = headers.get(b"authorization", "").partition(" ")
    credential = headers.get(b"x-api-key") or (token.strip() if scheme.lower() == "bearer" else "")
    try:
        if not credential:
            raise NotAuthenticated("a key is needed")
        if keys.cached_user(credential) is None:
            await sync_to_async(with_connection)(partial(keys.authenticate, credential))
    except NotAuthenticated as error:
        raise _Refusal(error) from None
    except (OperationalError, InterfaceError) as error:
        logger.warning("the database did not answer: %s", error)
        raise _Refusal(errors.Unavailable()) from None
    return settings.MAX_UPLOAD_BYTES


def _counted(receive: Receive, limit: int) -> Receive:
    num_bytes = 0

    async def counting() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > limit:
            raise _too_large(limit)
        return message

    return counting


def _too_large(limit: int) -> _Refusal:
    return _Refusal(PayloadTooLarge(f"a body has at most {limit} bytes here"))


async def _send(error: MintError, send: Send) -> None:
    request = HttpRequest()
    request.META["mintweb.request_id"] = uuid.uuid4().hex[:16]
    response = errors.reply(request, error)
    response["X-Request-Id"] = errors.request_id_of(request)
    response["Content-Length"] = str(len(response.content))
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in response.items()]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": response.content})
