"""No body is written to disk before it is known to be small enough, and large ones only for who has a key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from asgiref.sync import sync_to_async
from django.db import connection, connections
from pytest_django.fixtures import Settings

from runs.api.decorators import in_thread
from runs.rest.body_guard import BodyGuard
from tests.api.test_outage import _reconnect, database_away  # noqa: F401 - a fixture
from tests.rest.client import Rest

pytestmark = pytest.mark.django_db(transaction=True)
LIMIT, UPLOAD_LIMIT = 2_000, 10_000


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
async def key(transactional_db: None, settings: Settings) -> AsyncIterator[str]:
    """Return somebody's key; limits are small."""
    settings.MAX_BODY_BYTES, settings.MAX_UPLOAD_BYTES = LIMIT, UPLOAD_LIMIT
    yield (await sync_to_async(Rest.make)("alice")).key
    await sync_to_async(connections.close_all)()


async def parts(num_bytes: int) -> AsyncIterator[bytes]:
    for start in range(0, num_bytes, 500):
        yield b"x" * min(500, num_bytes - start)


async def post(path: str, num_bytes: int, *, key: str = "", is_told: bool) -> tuple[int, int, Any]:
    """Send a body whose size is told or not; return the status, how much came through, and the error."""
    eater = Eater()
    transport = httpx.ASGITransport(BodyGuard(eater))
    headers = {"x-api-key": key} if key else {}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", trust_env=False) as client:
        content: Any = b"x" * num_bytes if is_told else parts(num_bytes)
        reply = await client.post(path, content=content, headers=headers)
    return reply.status_code, eater.num_bytes, reply.json()["error"] if reply.content else None


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("path", ["/login/", "/rest/v1/runs", "/rest/v1/datasets/ds-1", "/rest/v1/datasetsx"])
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
