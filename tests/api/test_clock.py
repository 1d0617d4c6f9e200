"""The server's clock goes on after whatever befell a tick of it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from runs.api import clock
from runs.api.decorators import in_thread
from runs.models import ServerClock
from runs.services import sessions

WITHIN_S = 10.0


def uptime_s() -> float:
    """Return what the clock shows; it does not exist before its first tick."""
    row = ServerClock.objects.first()
    return row.uptime_s if row else 0.0


async def test_it_ticks_on_after_an_error_that_is_not_the_databases(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sessions, "TICK_S", 0.01)
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    messages.put_nowait({"type": "lifespan.startup"})
    sent: list[str] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message["type"])

    running = asyncio.ensure_future(clock.lifespan({}, messages.get, send))
    async with asyncio.timeout(WITHIN_S):
        with monkeypatch.context() as broken, caplog.at_level(logging.ERROR):
            broken.setattr(sessions, "_TICK", None)  # a statement that cannot even be sent
            while "the server's clock stands still" not in caplog.text:
                await asyncio.sleep(0.01)
        before = await in_thread(uptime_s)
        while await in_thread(uptime_s) <= before:
            await asyncio.sleep(0.01)
        messages.put_nowait({"type": "lifespan.shutdown"})
        await running
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
