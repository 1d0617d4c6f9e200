"""Uploads in parts, by the tus protocol, with a key instead of a session."""

from __future__ import annotations

import base64
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from asgiref.sync import sync_to_async
from django.db import connections

from mintweb import asgi
from runs.api import decorators, uploads
from runs.models import Upload
from tests.rest.client import Rest
from tests.rest.test_datasets import FILE

pytestmark = pytest.mark.django_db(transaction=True)
TUS = {"tus-resumable": "1.0.0"}
PART = {"content-type": "application/offset+octet-stream"}
application: Any = asgi.application


def http(**headers: str) -> httpx.AsyncClient:
    """Return a client of the application."""
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(application),
        base_url="http://localhost",
        trust_env=False,
        headers={**TUS, **{name.replace("_", "-"): text for name, text in headers.items()}},
    )


def metadata(**values: str) -> str:
    return ",".join(f"{name} {base64.b64encode(text.encode()).decode()}" for name, text in values.items())


@pytest.fixture
async def script(transactional_db: None) -> AsyncIterator[Rest]:
    """Return a user with a key whose row other threads see."""
    await _close_all()  # a test before this one may have ended the connections of these threads
    yield await sync_to_async(Rest.make)("alice")
    await sync_to_async(connections.close_all)()
    await _close_all()


async def _close_all() -> None:
    for pool in (uploads._threads, decorators._threads):
        await sync_to_async(_close, thread_sensitive=False)(pool)


def _close(pool: ThreadPoolExecutor) -> None:
    """Close the connection of every thread of a pool."""
    together = threading.Barrier(pool._max_workers)

    def close() -> None:
        together.wait(timeout=30)
        connections.close_all()

    for waiting in [pool.submit(close) for _ in range(pool._max_workers)]:
        waiting.result()


async def test_a_file_in_two_parts_becomes_a_dataset(script: Rest) -> None:
    async with http(x_api_key=script.key) as client:
        headers = {"upload-length": str(len(FILE)), "upload-metadata": metadata(filename="sums.jsonl")}
        made = await client.post("/rest/v1/uploads/", headers=headers)
        assert made.status_code == 201, made.text
        place = made.headers["location"]
        assert place.startswith("/rest/v1/uploads/up-")
        half = len(FILE) // 2
        for start, part in ((0, FILE[:half]), (half, FILE[half:])):
            asked = await client.head(place)
            assert asked.headers["upload-offset"] == str(start)
            sent = await client.patch(place, headers={**PART, "upload-offset": str(start)}, content=part)
            assert sent.status_code == 204, sent.text
        done = (await client.get(place)).json()
        assert done["offset"] == len(FILE)
        assert done["version"]["number"] == 1
    shown = await sync_to_async(script.get)(f"datasets/{done['version']['dataset']}")
    assert shown["name"] == "sums"


async def test_nothing_is_uploaded_without_a_key(script: Rest) -> None:
    for headers in ({}, {"x_api_key": "tml-wrong"}, {"cookie": "mintweb_session=x"}):
        async with http(**headers) as client:
            reply = await client.post("/rest/v1/uploads/", headers={"upload-length": "5"})
            assert reply.status_code == 401
    assert not await Upload.objects.aexists()


async def test_nobody_goes_on_with_somebody_elses_upload(script: Rest) -> None:
    async with http(x_api_key=script.key) as client:
        made = await client.post("/rest/v1/uploads/", headers={"upload-length": "5"})
    place = made.headers["location"]
    bob = await sync_to_async(Rest.make)("bob")
    async with http(x_api_key=bob.key) as stranger:
        for method in ("HEAD", "GET", "PATCH", "DELETE"):
            reply = await stranger.request(
                method, place, headers={**PART, "upload-offset": "0"}, content=b"12345"
            )
            assert reply.status_code == 404, method
    assert await Upload.objects.acount() == 1
