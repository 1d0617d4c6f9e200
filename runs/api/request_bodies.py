"""A request's body on its way in: never more of it in memory than the limit, whatever Content-Length says.

A refused operation takes up its seq_id, and the SDKs tell that in the body alone: protobuf in front of the data, JSON
of 0.22 behind it. So of a body that is refused both ends are kept for those who number their requests.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from runs.exceptions import BodyTooSlow, MintError, PayloadTooLarge, RequestInvalid, UnsupportedMedia
from runs.schemas import encodings

Receive = Callable[[], Awaitable[dict[str, Any]]]

_TIMEOUT_S: Final = 30
_SHORT_NUMBER: Final = re.compile(r"[0-9]{1,18}")
_END_BYTES: Final = 64 << 10
# What is so many times too large is not read to its end, where JSON may have its numbers.
_READ_ON: Final = 8


class ClientLeft(Exception):
    """The client closed the connection before it had its answer."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """All of a body; or why it is refused, and its first and last bytes as far as they are known."""

    content: bytes = b""
    refusal: MintError | None = None
    head: bytes = b""
    tail: bytes = b""

    def unpacked(self, encoding: str, *, limit: int) -> Body:
        """Undo its Content-Encoding."""
        if self.refusal is not None:
            return Body(refusal=self.refusal, head=_beginning(self.head, encoding))
        try:
            return Body(content=encodings.decompress(self.content, encoding, limit=limit))
        except UnsupportedMedia as error:  # some call a plain body "utf-8"
            return Body(refusal=error, head=self.content[:_END_BYTES], tail=self.content[-_END_BYTES:])
        except (PayloadTooLarge, RequestInvalid) as error:
            return Body(refusal=error, head=_beginning(self.content, encoding))


async def read(receive: Receive, headers: Mapping[str, str], *, limit: int, keeps_ends: bool) -> Body:
    """Read a body as it was sent.

    Args:
        keeps_ends: read on for the ends of one that is too large; else it is left alone at once.

    Raises:
        BodyTooSlow: it did not arrive in time.
        ClientLeft: it was cut off.
    """
    reading = _Reading(headers, limit=limit, keeps_ends=keeps_ends)
    try:
        await asyncio.wait_for(reading.take_all(receive), _TIMEOUT_S)
    except TimeoutError:
        if reading.refusal is None:
            raise BodyTooSlow(
                f"the body did not arrive within {_TIMEOUT_S} s; send the request again, or less at a time"
            ) from None
    return reading.body()


class _Reading:
    """What has come of a body."""

    def __init__(self, headers: Mapping[str, str], *, limit: int, keeps_ends: bool) -> None:
        self.refusal: MintError | None = None
        self._limit = limit
        # Protobuf, or what is packed, tells at its beginning or never.
        tells_in_front = is_proto(headers) or "content-encoding" in headers
        self._most_bytes = 0
        if keeps_ends:
            self._most_bytes = _END_BYTES if tells_in_front else _READ_ON * limit
        self._parts: list[bytes] = []
        self._num_bytes = 0
        self._head = self._tail = b""
        declared = headers.get("content-length", "")
        if _SHORT_NUMBER.fullmatch(declared) and int(declared) > limit:
            self.refusal = PayloadTooLarge(f"the body has {declared} bytes; the most is {limit}")
            if not tells_in_front and int(declared) > self._most_bytes:
                self._most_bytes = 0

    async def take_all(self, receive: Receive) -> None:
        """Receive the body to its end, or for as long as it tells anything."""
        has_more = True
        while has_more and not (self.refusal is not None and self._num_bytes >= self._most_bytes):
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            self._take(message.get("body", b""))
            has_more = message.get("more_body", False)

    def body(self) -> Body:
        """Return what has come."""
        if self.refusal is not None:
            return Body(refusal=self.refusal, head=self._head, tail=self._tail)
        return Body(content=self._parts[0] if len(self._parts) == 1 else b"".join(self._parts))

    def _take(self, part: bytes) -> None:
        self._parts.append(part)
        self._num_bytes += len(part)
        if self.refusal is None and self._num_bytes > self._limit:
            self.refusal = PayloadTooLarge(f"the body is longer than {self._limit} bytes")
        if self.refusal is not None:
            for come in self._parts:
                self._head += come[: _END_BYTES - len(self._head)]
                self._tail = (self._tail + come[-_END_BYTES:])[-_END_BYTES:]
            self._parts = []


def is_proto(headers: Mapping[str, str]) -> bool:
    """Say whether the body is protobuf."""
    return headers.get("content-type", "").startswith("application/x-protobuf")


def _beginning(packed: bytes, encoding: str) -> bytes:
    return encodings.beginning(packed, encoding, num_bytes=_END_BYTES)
