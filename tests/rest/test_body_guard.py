"""No body is kept before it is known to be small enough, large ones only for who has a key, and none for ever."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from asgiref.sync import sync_to_async
from django.db import connection, connections
from django.test import Client
from pytest_django.fixtures import Settings

from runs.api.decorators import in_thread
from runs.models import User
from runs.rest import body_guard
from runs.rest.body_guard import BodyGuard
from runs.services import uploads
from tests.api.test_outage import _reconnect, database_away  # noqa: F401 - a fixture
from tests.rest.client import Rest
from tests.services.test_disk import Volume

pytestmark = pytest.mark.django_db(transaction=True)
OPEN_LIMIT, PAGE_LIMIT, LIMIT, UPLOAD_LIMIT = 500, 1_000, 2_000, 10_000


class Eater:
    """An application that reads a body to its end."""

    def __init__(self) -> None:
        self.num_bytes = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        has_more = True
        while has_more:
            message = await receive()
            self.num_bytes += len(message.get("body", b""))
            has_more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
async def key(
    transactional_db: None, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[str]:
    """Return somebody's key; limits are small."""
    settings.MAX_BODY_BYTES, settings.MAX_UPLOAD_BYTES = LIMIT, UPLOAD_LIMIT
    monkeypatch.setattr(body_guard, "OPEN_BODY_BYTES", OPEN_LIMIT)
    monkeypatch.setattr(body_guard, "PAGE_BODY_BYTES", PAGE_LIMIT)
    yield (await sync_to_async(Rest.make)("alice")).key
    await sync_to_async(connections.close_all)()


async def parts(num_bytes: int) -> AsyncIterator[bytes]:
    for start in range(0, num_bytes, 250):
        yield b"x" * min(250, num_bytes - start)


async def post(
    path: str, num_bytes: int, *, key: str = "", cookie: str = "", is_told: bool
) -> tuple[int, int, Any]:
    """Send a body whose size is told or not; return the status, how much came through, and the error."""
    eater = Eater()
    transport = httpx.ASGITransport(BodyGuard(eater))
    headers = {"x-api-key": key} if key else {"cookie": f"mintweb_session={cookie}"} if cookie else {}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", trust_env=False) as client:
        content: Any = b"x" * num_bytes if is_told else parts(num_bytes)
        reply = await client.post(path, content=content, headers=headers)
    return reply.status_code, eater.num_bytes, reply.json()["error"] if reply.content else None


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("path", ["/rest/v1/runs", "/rest/v1/datasets/ds-1", "/rest/v1/datasetsx"])
async def test_a_body_has_a_limit_everywhere(key: str, path: str, is_told: bool) -> None:
    assert (await post(path, LIMIT, key=key, is_told=is_told))[:2] == (200, LIMIT)
    status, num_bytes, error = await post(path, LIMIT + 1, key=key, is_told=is_told)
    assert (status, error["code"]) == (413, "payload_too_large")
    assert num_bytes <= LIMIT


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("path", ["/rest/v1/datasets", "/rest/v1/datasets/ds-1/versions"])
async def test_a_file_has_a_limit_of_its_own(key: str, path: str, is_told: bool) -> None:
    assert (await post(path, UPLOAD_LIMIT, key=key, is_told=is_told))[:2] == (200, UPLOAD_LIMIT)
    status, num_bytes, _ = await post(path, UPLOAD_LIMIT + 1, key=key, is_told=is_told)
    assert (status, num_bytes <= UPLOAD_LIMIT) == (413, True)


@pytest.mark.parametrize("is_told", [True, False])
async def test_a_page_takes_a_form_of_who_is_signed_in(key: str, is_told: bool) -> None:
    cookie = await sync_to_async(signed_in)()
    assert (await post("/runs/new/", PAGE_LIMIT, cookie=cookie, is_told=is_told))[:2] == (200, PAGE_LIMIT)
    status, num_bytes, _ = await post("/runs/new/", PAGE_LIMIT + 1, cookie=cookie, is_told=is_told)
    assert (status, num_bytes <= PAGE_LIMIT) == (413, True)


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("cookie", ["", "a" * 32, '"\\000aaaaaaaaaaaa"'])
async def test_a_page_takes_little_of_a_stranger(key: str, cookie: str, is_told: bool) -> None:
    assert (await post("/login/", OPEN_LIMIT, cookie=cookie, is_told=is_told))[:2] == (200, OPEN_LIMIT)
    status, num_bytes, error = await post("/login/", OPEN_LIMIT + 1, cookie=cookie, is_told=is_told)
    assert (status, error["code"], num_bytes <= OPEN_LIMIT) == (413, "payload_too_large", True)


async def test_a_stranger_sends_a_script_s_body_only_if_it_is_small(key: str) -> None:
    assert (await post("/rest/v1/runs", OPEN_LIMIT, is_told=True))[:2] == (200, OPEN_LIMIT)
    status, num_bytes, error = await post("/rest/v1/runs", OPEN_LIMIT + 1, key="tml-wrong", is_told=True)
    assert (status, num_bytes, error["code"]) == (401, 0, "not_authenticated")


async def test_a_body_that_does_not_go_on_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_guard, "_TIMEOUT_S", 0.05)
    heads = [(b"x-api-key", key.encode()), (b"content-length", b"1500")]
    for path, headers in (("/login/", []), ("/rest/v1/runs", heads)):
        status, sent = await stalled(path, headers, [b"x" * 10])
        assert (status, sent[b"connection"]) == (408, b"close")


async def test_an_open_body_has_a_time_for_all_of_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_guard, "_TIMEOUT_S", 0.2)
    assert (await stalled("/login/", [], [b"x"] * 100, pause_s=0.01, is_whole=True))[0] == 408


async def test_a_large_body_may_take_long_while_it_goes_on(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_guard, "_TIMEOUT_S", 2.0)
    headers = [(b"x-api-key", key.encode()), (b"content-length", b"1500")]
    parts = [b"x" * 15] * 100
    assert (await stalled("/rest/v1/runs", headers, parts, pause_s=0.025, is_whole=True))[0] == 200


async def test_nobody_is_sent_away_who_waits_for_an_answer(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_guard, "_TIMEOUT_S", 0.05)
    leaves = asyncio.Event()
    messages = iter([{"type": "http.request", "body": b"x"}])

    async def receive() -> Any:
        if (message := next(messages, None)) is not None:
            return message
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def listen(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        asyncio.get_running_loop().call_later(0.2, leaves.set)
        assert (await receive())["type"] == "http.disconnect"

    await BodyGuard(listen)({"method": "POST", "path": "/login/", "headers": []}, receive, unheard)
    assert leaves.is_set()


async def test_a_disk_that_is_full_while_a_body_comes_is_told(key: str) -> None:
    async def full(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise OSError(errno.ENOSPC, "No space left on device")

    transport = httpx.ASGITransport(BodyGuard(full))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", trust_env=False) as client:
        reply = await client.post("/rest/v1/datasets", content=b"x", headers={"x-api-key": key})
    assert (reply.status_code, reply.json()["error"]["code"]) == (507, "disk_full")


async def test_a_file_that_would_not_fit_is_refused_unread(key: str, settings: Settings) -> None:
    settings.MAX_UPLOAD_BYTES = 1 << 60
    eater = Eater()
    headers = [(b"x-api-key", key.encode()), (b"content-length", str(1 << 59).encode())]
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"method": "POST", "path": "/rest/v1/datasets", "headers": headers}
    await BodyGuard(eater)(scope, unsent, send)
    assert (sent[0]["status"], eater.num_bytes) == (507, 0)
    assert b"bytes to spare" in sent[1]["body"]


@pytest.mark.parametrize("spare_bytes", [0, 3_000])
async def test_a_file_of_unknown_size_leaves_the_reserve(
    key: str, monkeypatch: pytest.MonkeyPatch, spare_bytes: int
) -> None:
    monkeypatch.setattr(body_guard, "_LOOK_EVERY_BYTES", 500)
    free = uploads._SPARE_BYTES + spare_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Volume(total=2 * free, used=free, free=free))
    status, num_bytes, error = await post("/rest/v1/datasets", UPLOAD_LIMIT, key=key, is_told=False)
    assert (status, error["code"]) == (507, "disk_full")
    assert "bytes to spare" in error["message"]
    assert num_bytes <= spare_bytes + 500


async def unheard(message: Any) -> None:
    raise AssertionError(f"answered by {message}")


async def unsent() -> Any:
    raise AssertionError("the body was read")


async def stalled(
    path: str, headers: Any, parts: list[bytes], *, pause_s: float = 0, is_whole: bool = False
) -> tuple[int, dict[bytes, bytes]]:
    """Send parts with pauses, and no more unless the body is whole; return the status and headers."""
    sent: list[Any] = []
    coming = iter(parts)
    num_left = len(parts)

    async def receive() -> Any:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            await asyncio.Event().wait()
        await asyncio.sleep(pause_s)
        return {
            "type": "http.request",
            "body": next(coming),
            "more_body": num_left > 0 or not is_whole,
        }

    async def send(message: Any) -> None:
        sent.append(message)

    async with asyncio.timeout(60):
        await BodyGuard(Eater())({"method": "POST", "path": path, "headers": headers}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"])


def signed_in() -> str:
    client = Client()
    client.force_login(User.objects.get(username="alice"))
    return client.cookies["mintweb_session"].value


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("wrong", ["", "tml-wrong"])
async def test_a_stranger_sends_no_large_file(key: str, wrong: str, is_told: bool) -> None:
    status, num_bytes, error = await post("/rest/v1/datasets", LIMIT + 1, key=wrong, is_told=is_told)
    assert (status, num_bytes, error["code"]) == (401, 0, "not_authenticated")


async def test_a_request_without_a_body_passes(key: str) -> None:
    eater = Eater()
    transport = httpx.ASGITransport(BodyGuard(eater))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", trust_env=False) as client:
        assert (await client.get("/rest/v1/datasets")).status_code == 200
        assert (await client.post("/rest/v1/datasets")).status_code == 200


def backend_pid() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


def end_backend(pid: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])


async def test_a_connection_that_died_is_replaced(key: str) -> None:
    pid = await sync_to_async(backend_pid)()
    await in_thread(lambda: end_backend(pid))

    assert (await post("/rest/v1/datasets", LIMIT + 1, key=key, is_told=True))[:2] == (200, LIMIT + 1)


async def test_while_the_database_is_away_large_files_are_to_come_again(key: str) -> None:
    async with database_away():
        status, num_bytes, error = await post("/rest/v1/datasets", LIMIT + 1, key="tml-unknown", is_told=True)
    assert (status, num_bytes, error["code"]) == (503, 0, "unavailable")
    assert (await post("/rest/v1/datasets", LIMIT + 1, key=key, is_told=True))[:2] == (200, LIMIT + 1)
