"""A script that talks to the REST API in this process: one `Rest` is one user with a key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from asgiref.sync import async_to_sync
from django.test import Client

from runs.models import User
from runs.services import keys

BASE = "/rest/v1/"


class Reply(Protocol):
    """What Django's test client returns."""

    status_code: int
    content: bytes
    headers: Any

    def json(self) -> Any:
        """Return the body's value."""


@dataclass
class Rest:
    """A user, their key, and requests sent with it."""

    user: User
    key: str = field(repr=False)

    @classmethod
    def make(cls, name: str) -> Rest:
        """Make a user with a key."""
        user = User.objects.create(username=name, email=f"{name}@example.org")
        _, key = keys.create_key(user, "test")
        return cls(user, key)

    def send(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        """Send one request to a path under /rest/v1/; underscores in header names become hyphens."""
        sent = {"x-api-key": self.key} | {name.replace("_", "-"): text for name, text in headers.items()}
        content_type = sent.pop("content-type", "application/json")
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        client = Client(raise_request_exception=False)
        return cast(
            Reply, client.generic(method, BASE + path, content, content_type=content_type, headers=sent)
        )

    def get(self, path: str, **headers: str) -> Any:
        """Return what a GET is answered; it must succeed."""
        reply = self.send("GET", path, **headers)
        assert reply.status_code == 200, reply.content
        return reply.json()

    def post(self, path: str, body: object = None, *, status: int = 201, **headers: str) -> Any:
        """Return what a POST is answered; it must succeed."""
        return self.done("POST", path, body, status=status, **headers)

    def done(self, method: str, path: str, body: object = None, *, status: int = 200, **headers: str) -> Any:
        """Return what a request is answered, which must have this status."""
        reply = self.send(method, path, body, **headers)
        assert reply.status_code == status, (reply.status_code, reply.content)
        return reply.json() if reply.content else None

    def refused(
        self, method: str, path: str, body: object = None, *, status: int = 422, **headers: str
    ) -> dict[str, Any]:
        """Return the error that a request is answered."""
        return error_of(self.send(method, path, body, **headers), status)

    def download(self, path: str) -> tuple[bytes, Any]:
        """Return a file and the headers it came with."""
        reply = self.send("GET", path)
        assert reply.status_code == 200
        return streamed(reply), reply.headers

    def walk(self, path: str) -> Iterator[Any]:
        """Yield the items of all pages of a list."""
        joint = "&" if "?" in path else "?"
        page = self.get(path)
        yield from page["items"]
        while page["next_cursor"] is not None:
            page = self.get(f"{path}{joint}cursor={page['next_cursor']}")
            yield from page["items"]


def error_of(reply: Reply, status: int) -> dict[str, Any]:
    """Return the error a client is shown, which always is whole."""
    assert reply.status_code == status, (reply.status_code, reply.content)
    assert reply.headers["content-type"] == "application/json"
    error: dict[str, Any] = reply.json()["error"]
    assert error.keys() == {"code", "message", "place", "hint", "request_id", "problems"}
    assert error["message"]
    assert error["problems"]
    assert error["request_id"] == reply.headers["x-request-id"]
    assert b"Traceback" not in reply.content
    return error


def streamed(reply: Any) -> bytes:
    """Return a file that is sent while it is read."""

    async def collect() -> bytes:
        return b"".join([part async for part in reply.streaming_content])

    return async_to_sync(collect)()
