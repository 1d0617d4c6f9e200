"""Sockets that run through the whole application: origin check, sign-in, routes, real Redis."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.layers import get_channel_layer
from django.db import connections
from django.test import Client
from django.utils import timezone

from runs import consumers
from runs.models import TrainingRun, User, Worker
from tests.consumers.sockets import Socket
from tests.pages import seed
from tests.services import rows

Open = Callable[..., Awaitable[Socket]]
STAYS = timezone.now() + timedelta(days=1)


@pytest.fixture
async def cookie(transactional_db: None) -> AsyncIterator[str]:
    """Return the session cookie of alice."""
    yield await sync_to_async(_sign_in)()
    await sync_to_async(connections.close_all)()
    await sync_to_async(_close_pool, thread_sensitive=False)()
    layer: Any = get_channel_layer()
    await layer.flush()


@pytest.fixture
async def run(cookie: str) -> TrainingRun:
    """Return alice's run with five steps of five values."""
    return await sync_to_async(_make_run)()


@pytest.fixture
async def connect(cookie: str) -> AsyncIterator[Open]:
    """Return a function that opens a socket; all are closed after the test."""
    opened: list[Socket] = []

    async def open_socket(
        path: str,
        *,
        with_cookie: str = cookie,
        origin: str = "http://localhost",
        host: str = "localhost",
        scheme: str = "ws",
    ) -> Socket:
        headers = [(b"host", host.encode()), *([(b"origin", origin.encode())] if origin else [])]
        if with_cookie:
            headers.append((b"cookie", f"mintweb_session={with_cookie}".encode()))
        socket = Socket(path, headers=headers, scheme=scheme)
        opened.append(socket)
        await socket.open()
        return socket

    yield open_socket
    for socket in opened:
        await socket.leave()


def _sign_in() -> str:
    client = Client()
    client.force_login(seed.make_user("alice", "a good long password"))
    return client.cookies["mintweb_session"].value


def _make_run() -> TrainingRun:
    run = seed.make_run(User.objects.get(username="alice"), name="live one")
    seed.add_values(
        run, seed.curve(5), ends_at=STAYS
    )  # or the row changes when its last value is some seconds old
    return run


def make_worker() -> Worker:
    """Enter a worker with the shipped model that stays alive though nobody renews its lease."""
    worker = rows.make_worker()
    Worker.objects.filter(pk=worker.pk).update(lease_until=STAYS)
    return worker


def _close_pool() -> None:
    """Close the connection of every thread that reads for sockets, or the test database cannot be dropped."""
    threads = consumers._threads
    together = threading.Barrier(threads._max_workers)

    def close() -> None:
        together.wait(timeout=60)
        connections.close_all()

    for waiting in [threads.submit(close) for _ in range(threads._max_workers)]:
        waiting.result()
