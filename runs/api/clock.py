"""The server's clock: it ticks in each web process while that can hear clients, so that outages do not count."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from runs.api.decorators import in_thread
from runs.services import sessions

logger = logging.getLogger(__name__)


async def lifespan(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Run the clock from the web process's start to its end (ASGI's lifespan protocol)."""
    await receive()
    ticking = asyncio.ensure_future(_tick_on())
    await send({"type": "lifespan.startup.complete"})
    await receive()
    ticking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await ticking
    await send({"type": "lifespan.shutdown.complete"})


async def _tick_on() -> None:
    while True:
        try:
            await in_thread(sessions.tick)
        except Exception:
            logger.exception("the server's clock stands still")
        await asyncio.sleep(sessions.TICK_S)
