"""The database goes away and comes back: clients are told to wait, waiting requests are still answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.db import connection

from runs.api import decorators, waiters
from runs.api.decorators import in_thread
from runs.models import TrainingRun
from tests.api import bodies
from tests.api.client import Actor, error_of, seqs_of
from tests.services.hand_worker import HandWorker

WITHIN_S = 10.0


@pytest.fixture(autouse=True)
def _reconnect() -> Iterator[None]:
    """Drop this thread's connection, which the outage has ended."""
    yield
    connection.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition with a deadline."""
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def database_away() -> AsyncIterator[None]:
    """Refuse connections to the test database and end those there are, as a restart does."""
    parameters = connection.get_connection_params()
    name = parameters["dbname"]
    direct: dict[str, Any] = {
        key: parameters[key] for key in ("host", "port", "user", "password") if parameters.get(key)
    }
    direct["dbname"] = "postgres"
    async with await psycopg.AsyncConnection.connect(**direct, autocommit=True) as outside:
        await outside.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS false')
        try:
            await outside.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = %s AND backend_type = 'client backend'",
                [name],
            )
            yield
        finally:
            await outside.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true')
            await sync_to_async(lambda: connection.close())()  # that of Django's async queries


async def test_while_the_database_is_away_clients_are_told_to_wait(alice: Actor, run: TrainingRun) -> None:
    body = bodies.optim_step(run, 1)
    soon = {"x_stainless_read_timeout": "0.1"}
    async with database_away():
        replies = [
            await alice.post("optim_step", body, **soon),
            await alice.post("retrieve_future", {"request_id": "op-1"}, **soon),
            await alice.get("training_runs", **soon),
            await Actor(alice.user, "tml-unknown").get("training_runs", **soon),
        ]
    for reply in replies:
        assert error_of(reply, 429)["code"] == "rate_limited"
        assert reply.headers["retry-after"] == "1"
    assert (await alice.post("optim_step", body)).status_code == 200


async def test_a_request_is_held_until_the_database_is_back(alice: Actor, run: TrainingRun) -> None:
    failed = decorators._num_failures
    async with database_away():
        held = [
            asyncio.create_task(alice.post("optim_step", bodies.optim_step(run, 1))),
            asyncio.create_task(alice.get("training_runs")),
        ]
        await until(lambda: decorators._num_failures >= failed + 4)  # each was tried again
    async with asyncio.timeout(WITHIN_S):
        assert [(await one).status_code for one in held] == [200, 200]
    assert (await seqs_of(run))[1:] == [(1, "optim_step", "queued")]


async def test_waiting_requests_are_answered_after_the_database_was_away(
    alice: Actor, run: TrainingRun, worker: HandWorker
) -> None:
    step = await alice.submit("optim_step", bodies.optim_step(run, 1))
    polling = asyncio.create_task(alice.poll(step))
    await until(lambda: bool(waiters.operations._events))
    async with database_away():
        await asyncio.sleep(3 * waiters._LOOK_S)  # long enough for a look at the rows to fail
    assert not polling.done()
    # Both ways of waking, each enough alone.
    assert not any(task.done() for task in waiters.operations._tasks)
    await in_thread(lambda: worker.finish(step))
    async with asyncio.timeout(WITHIN_S):
        assert (await polling).status_code == 200
