"""Drives the application in this process, without a socket; one `Actor` is one user with a key."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from mintweb import asgi
from runs.models import Operation, Session, TrainingRun, User
from runs.services import keys, sessions
from tests.services import rows

BASE = "/api/v1/"
Body = dict[str, Any] | bytes | None
application: Any = asgi.application


def http() -> httpx.AsyncClient:
    """Return a client of the application that sends nothing by itself."""
    transport = httpx.ASGITransport(application)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", trust_env=False)


async def send(method: str, path: str, body: Body = None, **headers: str) -> httpx.Response:
    """Send one request; underscores in header names become hyphens."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    sent = {"content-type": "application/json"} | {
        name.replace("_", "-"): text for name, text in headers.items()
    }
    async with http() as client:
        return await client.request(method, path, content=content, headers=sent)


@dataclass
class Actor:
    """A user, their key, and requests sent with it."""

    user: User
    key: str = field(repr=False)

    @classmethod
    def make(cls, name: str) -> Actor:
        """Make a user with a key."""
        user = rows.make_user(name)
        _, key = keys.create_key(user, "test")
        return cls(user, key)

    async def request(self, method: str, path: str, body: Body = None, **headers: str) -> httpx.Response:
        """Send a request to a path under /api/v1/."""
        return await send(method, BASE + path, body, x_api_key=self.key, **headers)

    async def post(self, path: str, body: Body = None, **headers: str) -> httpx.Response:
        """Send a POST."""
        return await self.request("POST", path, {} if body is None else body, **headers)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        """Send a GET."""
        return await self.request("GET", path, None, **headers)

    async def submit(self, path: str, body: Body) -> int:
        """Send a POST that must be taken, and return the operation's number."""
        reply = await self.post(path, body)
        assert reply.status_code == 200, reply.text
        return operation_pk(reply)

    async def poll(self, request_id: str | int, **headers: str) -> httpx.Response:
        """Ask for an operation's answer."""
        request_id = f"op-{request_id}" if isinstance(request_id, int) else request_id
        return await self.post(
            "retrieve_future", {"request_id": request_id, "allow_metadata_only": True}, **headers
        )

    def new_session(self) -> Session:
        """Open an SDK session."""
        return sessions.create_session(self.user)


def operation_pk(reply: httpx.Response) -> int:
    """Return the number in a submit's answer."""
    return int(reply.json()["request_id"].removeprefix("op-"))


async def operation(pk: int) -> Operation:
    """Return the operation's row."""
    return await Operation.objects.aget(pk=pk)


async def seqs_of(run: TrainingRun) -> list[tuple[int, str, str]]:
    """Return seq, kind and state of a run's operations."""
    found = Operation.objects.filter(run=run).order_by("seq").values_list("seq", "kind", "state")
    return [row async for row in found]


def error_of(reply: httpx.Response, status: int) -> dict[str, str]:
    """Return the error a client is shown, which always is whole."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    content: dict[str, str] = reply.json()
    assert content["detail"], content
    assert content["code"]
    assert content["category"] in ("user", "server")
    assert "Traceback" not in reply.text
    return content


class RawRequest:
    """A request in bare ASGI messages, for what an HTTP client would not send."""

    def __init__(self, path: str, *, headers: Sequence[tuple[str, str]] = (), method: str = "POST") -> None:
        self.sent: list[dict[str, Any]] = []
        self.num_received = 0
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": BASE + path,
            "raw_path": (BASE + path).encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
            "client": ("127.0.0.1", 1),
            "server": ("localhost", 80),
        }

    async def run(self, receive: Any) -> None:
        """Let the application answer, its messages coming from `receive`."""

        async def counting() -> Any:
            self.num_received += 1
            return await receive()

        async def send_out(message: Any) -> None:
            self.sent.append(message)

        await application(self.scope, counting, send_out)

    @property
    def status(self) -> int:
        """The status answered."""
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        """The headers answered."""
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def content(self) -> dict[str, Any]:
        """The JSON answered."""
        content: dict[str, Any] = json.loads(self.sent[1]["body"])
        return content


class Stopwatch:
    """Measures a with-block."""

    def __enter__(self) -> Stopwatch:
        self._start = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.elapsed_s = time.monotonic() - self._start
