"""What a page leaves behind in this process and in Redis when it goes: nothing, however it goes."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from channels.layers import get_channel_layer
from django.test import override_settings

from mintweb import embedded
from runs import consumers, events
from runs.models import TrainingRun, Worker
from runs.recipes.rendering import Renderer
from tests.consumers.conftest import Open
from tests.consumers.sockets import PATIENCE_S, subscribed
from tests.consumers.test_playground import asked, question, renderer, worker

__all__ = ["renderer", "worker"]
pytestmark = pytest.mark.django_db(transaction=True)


def remains() -> set[str]:
    """Return all names that the layer holds: channels, groups, and what it has asked Redis for."""
    layer: Any = get_channel_layer()
    (shard,) = layer._shards
    return {*layer.channels, *layer.groups, *shard._subscribed_to}


async def nothing_remains() -> None:
    async with asyncio.timeout(20):
        while remains():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("waits", [True, False])
async def test_a_page_leaves_its_group(connect: Open, run: TrainingRun, *, waits: bool) -> None:
    for _ in range(3):
        sockets = [await connect(path) for path in (f"/ws/runs/{run.public_id}/", "/ws/playground/")]
        if waits:
            await subscribed(events.run_group(run.pk))
        for socket in sockets:
            await socket.leave()
    await nothing_remains()


async def test_a_page_stays_when_another_on_the_same_run_goes(connect: Open, run: TrainingRun) -> None:
    layer: Any = get_channel_layer()
    first, second = [await connect(f"/ws/runs/{run.public_id}/") for _ in range(2)]
    await subscribed(events.run_group(run.pk))
    await first.leave()
    await second.say_json({"after": 10})
    await second.hear()
    async with asyncio.timeout(PATIENCE_S):
        while len(layer.channels) != 1:
            await asyncio.sleep(0.01)
    assert len(layer.groups) == 1
    await subscribed(events.run_group(run.pk))


async def test_a_talking_page_leaves_the_groups_of_its_samples(
    connect: Open, renderer: Renderer, worker: Worker
) -> None:
    socket = await connect("/ws/playground/")
    await socket.say_json(question())
    (row,) = await asked()
    assert row.sampling_session_id is not None
    await subscribed(events.sampling_group(row.sampling_session_id))
    await socket.leave()
    await nothing_remains()


async def test_a_page_whose_server_fails_leaves_too(connect: Open, run: TrainingRun) -> None:
    socket = await connect(f"/ws/runs/{run.public_id}/")
    await subscribed(events.run_group(run.pk))
    socket.break_off()
    await nothing_remains()


class OwnRedis:
    """A Redis that can be away for a while."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.start()

    def start(self) -> None:
        """Start it empty."""
        self._process = subprocess.Popen(embedded.prepare_redis(self.data_dir), stdout=subprocess.DEVNULL)
        embedded.wait_for_redis(self.data_dir)

    def stop(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    """Return a Redis for the hints of one test."""
    server = OwnRedis(tmp_path)
    layers: Any = {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [embedded.redis_url(tmp_path)]},
        }
    }
    with override_settings(CHANNEL_LAYERS=layers):
        yield server
    server.stop()


async def test_pages_that_go_while_redis_is_away_leave_it_when_it_is_back(
    cookie: str, connect: Open, run: TrainingRun, own_redis: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "_RESUBSCRIBE_S", 0.05)
    monkeypatch.setattr(consumers.LiveConsumer, "self_check_s", 0.1)
    path = f"/ws/runs/{run.public_id}/"
    layer: Any = get_channel_layer()
    before = await connect(path)
    async with asyncio.timeout(PATIENCE_S):
        while not {*layer.groups} & layer._shards[0]._subscribed_to:
            await asyncio.sleep(0.01)
    await asyncio.to_thread(own_redis.stop)
    await before.leave()
    later = await connect("/ws/runs/")
    await later.say_json({"rows": [], "is_first_page": False})
    for _ in range(4):  # an answer and three looks without a hint: Redis was tried again and again
        await later.hear()
    assert len(layer.channels) <= 1
    await later.leave()
    await asyncio.to_thread(own_redis.start)
    await nothing_remains()
