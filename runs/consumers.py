"""Websockets of open pages: what is new since the page's cursor, read from rows. The list's is in `run_list_consumer`.

A hint only says when to look. Each consumer also looks by itself every few seconds, so a lost hint, or
a Redis that is gone, costs seconds and loses nothing. The page counts what it has by the cursor.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from typing import Any, ClassVar, Final, TypeVar
from uuid import uuid4

import redis.exceptions
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.layers import get_channel_layer
from django.conf import settings
from django.contrib.auth import HASH_SESSION_KEY, SESSION_KEY
from django.db import DatabaseError, DataError, InterfaceError
from django.template.loader import render_to_string
from django.utils.crypto import constant_time_compare

from runs import events
from runs.exceptions import MintError
from runs.models import User
from runs.services import access, metrics, run_rows, run_versions
from runs.threads import with_connection

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

NOT_SIGNED_IN: Final = 4401
NOT_FOUND: Final = 4404
BAD_MESSAGE: Final = 4400
TRY_AGAIN: Final = 4503
_MAX_MESSAGE_CHARS: Final = 20_000
_RESUBSCRIBE_S: Final = 5.0
_LONGEST_JOIN_S: Final = 1.0
_REDIS_ERRORS: Final = (OSError, redis.exceptions.RedisError)
_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pages-live")


class Listener:
    """What one page hears from its groups: in them from when Redis answers until `close`, then out of them.

    The layer (channels_redis.pubsub) forgets by itself no group, and no channel whose subscription failed. So
    each group has a task that enters and leaves it and is never cancelled: a page that goes cuts nothing short.
    The channel is only put into the layer's table: it is in groups alone, and they are what Redis knows.
    """

    _stays: ClassVar[set[asyncio.Task[None]]] = set()  # or nobody would hold those of pages that are gone

    def __init__(self) -> None:
        layer: Any = get_channel_layer()
        self._layer = layer
        self._channel = f"page.{uuid4().hex}"
        self._is_over = asyncio.Event()
        self._layer.channels[self._channel] = asyncio.Queue()

    async def join(self, group: str) -> None:
        """Enter a group; returns when that is done, or while it goes on if Redis does not answer soon."""
        is_in = asyncio.Event()
        task = asyncio.ensure_future(self._stay(group, is_in))
        self._stays.add(task)
        task.add_done_callback(self._stays.discard)
        await _wait_for(is_in, _LONGEST_JOIN_S)

    async def receive(self) -> dict[str, Any]:
        """Return the next message to one of the groups."""
        message: dict[str, Any] = await self._layer.receive(self._channel)
        return message

    def close(self) -> None:
        """Hear nothing more."""
        self._is_over.set()
        self._layer.channels.pop(self._channel, None)

    async def _stay(self, group: str, is_in: asyncio.Event) -> None:
        while not self._is_over.is_set():
            try:
                await self._layer.group_add(group, self._channel)
            except _REDIS_ERRORS as error:
                logger.info("no hints for a live page, it looks by itself: %s", error)
                await _wait_for(self._is_over, _RESUBSCRIBE_S)
            else:
                is_in.set()
                await self._is_over.wait()
        while not await self._leave(group):
            await asyncio.sleep(_RESUBSCRIBE_S)

    async def _leave(self, group: str) -> bool:
        """Leave a group; false when Redis did not hear of it, and would go on sending."""
        try:
            await self._layer.group_discard(group, self._channel)
        except _REDIS_ERRORS:
            # The layer has forgotten that we were in it, and lets only those out who are.
            with suppress(*_REDIS_ERRORS):
                self._layer.channels[self._channel] = asyncio.Queue()
                await self._layer.group_add(group, self._channel)
            self._layer.channels.pop(self._channel, None)
            return False
        return True


async def _wait_for(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for an event, but not longer than so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


class LiveConsumer(AsyncWebsocketConsumer):
    """What the sockets share: the sign-in and its recheck, hints, and the loop that looks for news."""

    policy: ClassVar[str] = "owner"
    # We subscribe to hints ourselves: a dead Redis must not end the socket.
    channel_layer_alias = ""
    self_check_s: ClassVar[float] = 5.0
    interval_s: ClassVar[float] = 0.25

    user: User

    async def __call__(self, *arguments: Any) -> None:
        """Serve one socket, whose loops end with it, however it ends."""
        self._tasks: list[asyncio.Task[None]] = []
        self._listener = Listener()
        try:
            await super().__call__(*arguments)
        finally:
            self._end()

    async def connect(self) -> None:
        """Take the owner in; everybody else is told why not by the code of the close.

        A socket that is closed before it is accepted gets no code: the browser hears of a failed handshake alone.
        """
        self._hinted: set[str] = set()
        self._news = asyncio.Event()
        self._checked_at = time.monotonic()
        user: Any = self.scope["user"]
        if not user.is_authenticated or not user.is_active:
            await self._turn_away(NOT_SIGNED_IN)
            return
        self.user = user
        try:
            group = await in_thread(self._open)
        except (MintError, DataError):  # an id with NUL is no row's
            await self._turn_away(NOT_FOUND)
            return
        await self.accept()
        self._start(self._listen(group))

    async def _turn_away(self, code: int) -> None:
        await self.accept()
        await self.close(code)

    async def disconnect(self, code: int) -> None:
        """End the loops."""
        self._end()

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """Take what the page holds, and send it everything after that."""
        if not self._tasks:  # turned away; the page's first message has crossed with the close
            return
        try:
            message = json.loads((text_data or "")[:_MAX_MESSAGE_CHARS])
            self._take(message if isinstance(message, dict) else {})
        except ValueError:
            await self.close(BAD_MESSAGE)
            return
        self._news.set()
        if len(self._tasks) == 1:
            self._start(self._pump())

    # What the sockets do differently

    def _open(self) -> str:
        """Check access and return the group of the hints; runs in a thread."""
        raise NotImplementedError

    def _take(self, message: dict[str, Any]) -> None:
        """Take a message from the page; ValueError refuses it."""
        raise NotImplementedError

    async def _send_news(self, hinted: set[str], *, is_self_check: bool) -> None:
        """Send what the page does not have yet."""
        raise NotImplementedError

    def _hear(self, hint: dict[str, Any]) -> None:
        """Take a message to the page's groups."""
        self._hinted.add(str(hint.get("run", "")))
        self._news.set()

    # Loops

    def _start(self, loop: Awaitable[None]) -> None:
        self._tasks.append(asyncio.ensure_future(loop))

    async def _pump(self) -> None:
        try:
            while True:
                is_self_check = not await self._wait()
                if is_self_check or time.monotonic() - self._checked_at > self.self_check_s:
                    self._checked_at, is_self_check = time.monotonic(), True
                    if not await in_thread(self._is_signed_in):
                        await self.close(NOT_SIGNED_IN)
                        return
                self._news.clear()
                hinted, self._hinted = self._hinted, set()
                await self._send_news(hinted, is_self_check=is_self_check)
                await asyncio.sleep(self.interval_s)
        except MintError:
            await self.close(NOT_FOUND)
        except (DatabaseError, InterfaceError) as error:
            logger.warning("a live page lost the database: %s", error)
            await self.close(TRY_AGAIN)

    async def _wait(self) -> bool:
        """Return true at a hint, false when it is time to look without one."""
        try:
            await asyncio.wait_for(self._news.wait(), self.self_check_s)
        except TimeoutError:
            return False
        return True

    async def _listen(self, group: str) -> None:
        if group:
            await self._listener.join(group)
        while True:
            self._hear(await self._listener.receive())

    def _end(self) -> None:
        self._listener.close()
        while self._tasks:
            self._tasks.pop().cancel()

    def _is_signed_in(self) -> bool:
        """Look again: signed out, password changed or user switched off ends the socket."""
        key = self.scope["session"].session_key
        session = import_module(settings.SESSION_ENGINE).SessionStore(key)
        user = User.objects.filter(pk=session.get(SESSION_KEY), is_active=True).first()
        if user is None or user.pk != self.user.pk:
            return False
        return constant_time_compare(session.get(HASH_SESSION_KEY, ""), user.get_session_auth_hash())


class RunConsumer(LiveConsumer):
    """One run's page: `{"after": seq}` from the page, then `{"points", "cursor", "changed", "facts"?, "version"?}` to it.

    A point is `[seq, step, seconds since 1970, name, value]`; values that JSON lacks are strings.
    A message without points tells that the run changed otherwise, or only that the socket lives.
    The version comes when no hint did for a while: a page that shows another one has missed something.
    """

    max_points: ClassVar[int] = metrics.MAX_POINTS

    def _open(self) -> str:
        self._cursor = -1
        self._facts = ""
        self.run = access.get_run(self.user, self.scope["url_route"]["kwargs"]["run_id"])
        return events.run_group(self.run.pk)

    def _take(self, message: dict[str, Any]) -> None:
        after = message.get("after")
        if not isinstance(after, int) or isinstance(after, bool) or not -1 <= after < 2**63:
            raise ValueError("after is a seq, or -1")
        self._cursor = after

    async def _send_news(self, hinted: set[str], *, is_self_check: bool) -> None:
        cursor = self._cursor
        is_quiet = is_self_check and not hinted
        points, facts, version = await in_thread(lambda: self._read(cursor, is_quiet=is_quiet))
        if self._cursor != cursor:  # the page has just told another cursor; what was read may be a gap to it
            self._news.set()
            return
        message: dict[str, Any] = {"points": [point.as_json() for point in points]}
        if points:
            self._cursor = points[-1].seq
        message["cursor"] = self._cursor
        message["changed"] = bool(hinted) or facts != self._facts
        if facts != self._facts:
            self._facts = message["facts"] = facts
        if version:
            message["version"] = version
        await self.send(json.dumps(message, separators=(",", ":"), allow_nan=False))
        if len(points) >= self.max_points // 2:
            self._news.set()

    def _read(self, cursor: int, *, is_quiet: bool) -> tuple[list[metrics.Point], str, str]:
        run = run_rows.with_facts(self.user).filter(pk=self.run.pk).first()
        if run is None:
            raise MintError
        facts = render_to_string("runs/_facts.html", {"facts": run_rows.facts_of(run)})
        version = run_versions.version_of(run.pk) if is_quiet else ""
        return metrics.points_after(run, cursor, limit=self.max_points), facts, version


async def in_thread(call: Callable[[], Result]) -> Result:
    """Run database work beside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_threads, with_connection, call)
