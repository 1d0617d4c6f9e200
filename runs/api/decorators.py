"""What every SDK endpoint shares: the body with its limit, the key, the errors as JSON.

A view is a plain function of an `ApiRequest` that returns a `Reply`; it runs in a thread of its own
pool, where Django's database connections live. A view that waits is a coroutine function instead.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl

from django.conf import settings
from django.db import DatabaseError, InterfaceError, OperationalError, close_old_connections

from runs.api import request_bodies
from runs.api.request_bodies import Body, ClientLeft
from runs.exceptions import (
    MethodNotAllowed,
    MintError,
    NotAuthenticated,
    NotFound,
    RateLimited,
    RequestInvalid,
)
from runs.models import User
from runs.services import keys

logger = logging.getLogger(__name__)

Scope = dict[str, Any]
Receive = request_bodies.Receive
Send = Callable[[dict[str, Any]], Awaitable[None]]
Result = TypeVar("Result")

# A request that cannot be answered yet is held for so long: the SDKs would ask again at once.
HOLD_S: Final = 25.0
# A client that waits less than usual gets its "not yet" before it gives the request up.
HOLD_SHARE: Final = 0.6
_AGAIN_S: Final = 0.5
_SERVERS_FAULT: Final = 500
# What anyone may send who has no key; the SDKs send a few hundred bytes there.
_OPEN_BODY_BYTES: Final = 64 << 10
_SHORT_NUMBER: Final = re.compile(r"[0-9]{1,18}")
_DURATION: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_num_failures = 0
_checked = threading.local()
_threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="api")
# Parts of a large answer may be long in coming out of a bucket: no other request waits behind them.
_parts_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="api-parts")


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """A request whose body was read and whose key was checked. Header names are lower case."""

    method: str
    scheme: str
    path_args: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    received: Body
    credential: str
    held_until: float
    _user: User | None

    @property
    def body(self) -> bytes:
        """All of the body.

        Raises:
            MintError: it was refused.
        """
        if self.received.refusal is not None:
            raise self.received.refusal
        return self.received.content

    @property
    def user(self) -> User:
        """The owner of the key; only endpoints without a key check have none."""
        assert self._user is not None
        return self._user

    @property
    def is_proto(self) -> bool:
        """Whether the body is protobuf."""
        return request_bodies.is_proto(self.headers)

    @property
    def accepts_proto(self) -> bool:
        """Whether the answer may be protobuf."""
        return "application/x-protobuf" in self.headers.get("accept", "")

    @property
    def accepts_json(self) -> bool:
        """Whether the answer may be JSON."""
        return "application/json" in self.headers.get("accept", "")

    @property
    def base_url(self) -> str:
        """Scheme and host as the client wrote them."""
        return f"{self.scheme}://{self.headers.get('host', '')}"

    def page(self, *, default_limit: int) -> tuple[int, int]:
        """Return offset and limit of a listing.

        Raises:
            RequestInvalid: one is no number or out of range.
        """
        return self._number("offset", 0, low=0, high=2**31), self._number(
            "limit", default_limit, low=1, high=1000
        )

    def _number(self, name: str, default: int, *, low: int, high: int) -> int:
        text = self.query.get(name, str(default))
        if not _SHORT_NUMBER.fullmatch(text) or not low <= int(text) <= high:
            raise RequestInvalid(f"{text[:40]!r} is no whole number from {low} to {high}", place=name)
        return int(text)

    @property
    def hold_s(self) -> float:
        """Seconds for which an answer may still be waited for, before the client gives the request up."""
        return max(self.held_until - time.monotonic(), 0.0)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer in its final bytes; a large one is given as `parts` and sent while they are made."""

    body: bytes = b""
    parts: Iterator[bytes] | None = None
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


def json_reply(
    content: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Reply:
    """Answer with a JSON object."""
    body = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    return Reply(body=body, status=status, headers=headers or {})


NO_CONTENT: Final = Reply(status=204)
View = Callable[[ApiRequest], Reply] | Callable[[ApiRequest], Coroutine[Any, Any, Reply]]


class Endpoint:
    """An ASGI application with one view per method; `needs_key` is its access policy. Some take small bodies only.

    A view of operations gets requests whose body is refused, too: it raises that once it asks for the body.
    """

    def __init__(
        self,
        views: Mapping[str, View],
        *,
        needs_key: bool,
        max_body_bytes: int | None = None,
        takes_operations: bool = False,
    ) -> None:
        self.views = views
        self.needs_key = needs_key
        self._max_body_bytes = max_body_bytes
        self._takes_operations = takes_operations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await respond(scope, send, self._answer(scope, receive))

    async def _answer(self, scope: Scope, receive: Receive) -> Reply:
        view = self.views.get(scope["method"])
        if view is None:
            raise MethodNotAllowed(f"use {' or '.join(self.views)} here, not {scope['method']}")
        headers = headers_of(scope)
        held_until = time.monotonic() + _hold_s(headers)
        credential = credential_in(headers)
        user = None
        if self.needs_key:
            if not credential:
                raise NotAuthenticated
            user = await _once_reachable(lambda: user_of(credential), held_until)
        path_args: Mapping[str, str] = scope["url_route"]["kwargs"]
        if any("\0" in arg for arg in path_args.values()):  # no text of PostgreSQL's holds one
            raise NotFound
        limit = min(self._max_body_bytes or settings.MAX_BODY_BYTES, settings.MAX_BODY_BYTES)
        body = await self._body(receive, headers, limit)
        request = ApiRequest(
            method=scope["method"],
            scheme=scope.get("scheme", "http"),
            path_args=path_args,
            query=dict(parse_qsl(scope["query_string"].decode("latin-1"))),
            headers=headers,
            received=body,
            credential=credential,
            held_until=held_until,
            _user=user,
        )
        return await _once_reachable(lambda: _run(view, request, receive), held_until)

    async def _body(self, receive: Receive, headers: Mapping[str, str], limit: int) -> Body:
        body = await request_bodies.read(receive, headers, limit=limit, keeps_ends=self._takes_operations)
        encoding = headers.get("content-encoding", "")
        if encoding:
            packed = body
            body = await in_thread(lambda: packed.unpacked(encoding, limit=limit))
        if body.refusal is not None and not self._takes_operations:
            raise body.refusal
        return body


def endpoint(**views: View) -> Endpoint:
    """Make an endpoint that needs a key, e.g. `endpoint(POST=view)`."""
    return Endpoint(views, needs_key=True)


def operation_endpoint(view: View) -> Endpoint:
    """Make an endpoint of operations: its view is asked about refused ones, too, to take up their seq_id."""
    return Endpoint({"POST": view}, needs_key=True, takes_operations=True)


def open_endpoint(*, max_body_bytes: int = _OPEN_BODY_BYTES, **views: View) -> Endpoint:
    """Make an endpoint that anyone may call."""
    return Endpoint(views, needs_key=False, max_body_bytes=max_body_bytes)


async def respond(scope: Scope, send: Send, answering: Coroutine[Any, Any, Reply]) -> None:
    """Send an answer when it is there; every error becomes JSON here."""
    try:
        reply = await answering
    except MintError as error:
        if error.http_status >= _SERVERS_FAULT:
            logger.warning("%s could not be answered: %s", scope["path"], error)
        reply = error_reply(error)
    except (OperationalError, InterfaceError) as error:
        logger.warning("the database did not answer: %s", error)
        reply = error_reply(RateLimited("the database is not reachable just now; send the request again"))
    except ClientLeft:
        return
    except Exception:  # noqa: BLE001 - the boundary: whatever it was, the client gets JSON
        reply = _crash_reply(scope)
    await _send(reply, send)


def headers_of(scope: Scope) -> dict[str, str]:
    """Return a request's headers; their names are lower case."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def credential_in(headers: Mapping[str, str]) -> str:
    """Return the API key or token that was sent, or an empty text."""
    return keys.sent_in(headers.get("x-api-key", ""), headers.get("authorization", ""))


async def user_of(credential: str) -> User:
    """Return whose key or token this is.

    Raises:
        NotAuthenticated: nobody's.
    """
    known = keys.cached_user(credential)
    return known if known is not None else await in_thread(lambda: keys.authenticate(credential))


async def _run(view: View, request: ApiRequest, receive: Receive) -> Reply:
    if inspect.iscoroutinefunction(view):
        return await while_connected(view(request), receive)
    return await in_thread(lambda: view(request))  # type: ignore[arg-type, return-value]


async def _once_reachable(call: Callable[[], Awaitable[Result]], held_until: float) -> Result:
    """Await a call that is safe to repeat, again and again while the database is away.

    A client that heard of each failure would send again all the time, and then be late when the database is back.
    """
    while True:
        try:
            return await call()
        except (OperationalError, InterfaceError):
            if time.monotonic() + _AGAIN_S > held_until:
                raise
        await asyncio.sleep(_AGAIN_S)


def _hold_s(headers: Mapping[str, str]) -> float:
    """Return for how long a request may be held; the SDKs say in a header how long they wait."""
    text = headers.get("x-stainless-read-timeout", "")
    patience_s = float(text) if _DURATION.fullmatch(text) else math.inf
    return min(HOLD_S, HOLD_SHARE * patience_s)


async def in_thread(call: Callable[[], Result], pool: ThreadPoolExecutor = _threads) -> Result:
    """Run a database call in the API's thread pool, or another one."""
    return await asyncio.get_running_loop().run_in_executor(pool, _with_connection, call)


# What a client does next: exchange its key for a fresh token, wait for so many seconds, send no more of a slow body.
_HINTS: Final[Mapping[int, Mapping[str, str]]] = {
    401: {"www-authenticate": 'Bearer error="invalid_token"'},
    408: {"retry-after": "1", "connection": "close"},
    429: {"retry-after": "1"},
    507: {"retry-after": "5"},
}


def error_reply(error: MintError) -> Reply:
    """Answer with an error; the SDK shows `detail` to its user."""
    content = {"detail": str(error), "code": error.code, "category": error.category}
    if error.place:
        content["place"] = error.place
    return json_reply(content, status=error.http_status, headers=_HINTS.get(error.http_status))


async def while_connected(waiting: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """Await what waits for long, and end it when the client goes away.

    Raises:
        ClientLeft: it has.
    """
    answering = asyncio.create_task(waiting)
    leaving = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientLeft
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()
        await asyncio.wait((answering, leaving))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _with_connection(call: Callable[[], Result]) -> Result:
    """Make a database call with this thread's connection.

    Connections are checked only after one of them has failed, since a check costs every call a round trip.
    """
    global _num_failures
    if getattr(_checked, "num_failures", 0) != _num_failures:
        _checked.num_failures = _num_failures
        close_old_connections()
    try:
        return call()
    except (DatabaseError, InterfaceError):
        _num_failures += 1
        raise


def _crash_reply(scope: Scope) -> Reply:
    incident = uuid.uuid4().hex[:12]
    logger.exception("incident %s at %s %s", incident, scope["method"], scope["path"])
    return json_reply(
        {
            "detail": f"the server failed; its log names this incident {incident}",
            "code": "server_error",
            "category": "server",
        },
        status=500,
    )


async def _send(reply: Reply, send: Send) -> None:
    headers = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
    headers.append((b"x-content-type-options", b"nosniff"))
    if reply.status != 204:
        headers.append((b"content-type", reply.content_type.encode()))
        if reply.parts is None:
            headers.append((b"content-length", str(len(reply.body)).encode()))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    if reply.parts is not None:
        await _send_parts(reply.parts, send)
    await send({"type": "http.response.body", "body": reply.body})


async def _send_parts(parts: Iterator[bytes], send: Send) -> None:
    while (part := await in_thread(lambda: next(parts, None), _parts_threads)) is not None:
        await send({"type": "http.response.body", "body": part, "more_body": True})
