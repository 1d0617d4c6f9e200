"""The other end of a websocket, over ASGI without a network (channels.testing needs daphne for the same)."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import quote

from asgiref.testing import ApplicationCommunicator
from django.conf import settings
from redis.asyncio import Redis

from mintweb.asgi import application

PATIENCE_S = 60


async def subscribed(group: str) -> None:
    """Wait until a socket hears what is sent to a group; what is sent before is lost."""
    layers: Any = settings.CHANNEL_LAYERS
    name = f"{layers['default']['CONFIG']['prefix']}__group__{group}"
    async with asyncio.timeout(PATIENCE_S), Redis.from_url(settings.REDIS_URL) as client:
        while not dict(await client.pubsub_numsub(name)).get(name.encode()):
            await asyncio.sleep(0.01)


class Socket:
    """One browser's socket."""

    is_open = False
    is_broken_off = False
    close_code = 0

    def __init__(self, path: str, *, headers: list[tuple[bytes, bytes]], scheme: str = "ws") -> None:
        scope = {
            "type": "websocket",
            "scheme": scheme,
            "path": path,
            "raw_path": quote(path).encode(),
            "query_string": b"",
        }
        self._end: Any = ApplicationCommunicator(
            application, {**scope, "headers": headers, "subprotocols": []}
        )  # type: ignore[no-untyped-call]

    async def open(self) -> None:
        """Shake hands; `is_open` tells whether that worked."""
        await self._end.send_input({"type": "websocket.connect"})
        reply = await self._end.receive_output(timeout=PATIENCE_S)
        self.is_open = reply["type"] == "websocket.accept"
        self.close_code = reply.get("code", 0)

    async def say(self, text: str) -> None:
        """Send a text."""
        await self._end.send_input({"type": "websocket.receive", "text": text})

    async def say_json(self, message: object) -> None:
        """Send a message as JSON."""
        await self.say(json.dumps(message))

    async def hear(self) -> dict[str, Any]:
        """Return the next message."""
        reply = await self._end.receive_output(timeout=PATIENCE_S)
        assert reply["type"] == "websocket.send", reply
        message: dict[str, Any] = json.loads(reply["text"])
        return message

    async def closing_code(self) -> int:
        """Return with which code the server ends the socket, which it had accepted."""
        assert self.is_open
        while True:
            reply = await self._end.receive_output(timeout=PATIENCE_S)
            if reply["type"] == "websocket.close":
                self.is_open = False
                return int(reply["code"])

    async def leave(self) -> None:
        """Close from the browser's side, or tell that the server's closing has arrived."""
        if self.is_broken_off:
            return
        await self._end.send_input({"type": "websocket.disconnect", "code": 1000})
        await self._end.wait(timeout=PATIENCE_S)

    def break_off(self) -> None:
        """End the socket as the server does for itself, without telling its consumer."""
        self.is_broken_off = self._end.future.cancel()
