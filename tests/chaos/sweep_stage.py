"""Servers for the passes, everything imported once, and places that work side by side, each a process of its own."""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.context import ForkContext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.chaos.sweep_calls import Fault
from tests.chaos.sweep_processes import Place, enter
from tests.up.instances import free_port

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

    from tests.chaos.sweep_case import Outcome

_IMPORTED_ONCE: Final = (
    "celery.app.amqp",
    "celery.app.trace",
    "celery.result",
    "channels_redis.pubsub",
    "gpuworker.tasks",
    "gpuworker.worker",
    "kombu.transport.redis",
    "mintweb.asgi",
    "mintweb.celery",
    "numpy.ctypeslib",
    "tests.chaos.sweep_case",
    "tests.chaos.engine",
    "uvicorn.lifespan.off",
    "uvicorn.loops.uvloop",
    "uvicorn.protocols.http.httptools_impl",
)
_place: Place | None = None


@contextlib.contextmanager
def databases(folder: Path) -> Iterator[None]:
    """Run PostgreSQL and Redis, make the tables and the key, and import all that a process needs."""
    from mintweb import embedded

    with embedded.running(folder, durable=False) as (database_url, redis_url):
        os.environ |= {"DATABASE_URL": database_url, "REDIS_URL": redis_url}
        import django

        django.setup()
        from django.core.management import call_command
        from django.db import connections

        from runs.services import keys

        call_command("migrate", verbosity=0, interactive=False)
        keys.ensure_key_from_settings()
        connections.close_all()
        for module in _IMPORTED_ONCE:
            importlib.import_module(module)
        gc.freeze()  # what all children share is not to be copied for the collector's sake
        yield


@contextlib.contextmanager
def places(folder: Path, *, jobs: int) -> Iterator[Callable[[Iterable[Fault | None]], Iterator[Outcome]]]:
    """Yield a function that makes passes, `jobs` of them at a time, and gives what came of each."""
    context: ForkContext = multiprocessing.get_context("fork")
    waiting: SimpleQueue[Place] = context.SimpleQueue()
    for number in range(jobs):
        database = f"pass_{number}"
        _copy_database(database)
        waiting.put(Place(folder=folder / database, database=database, port=free_port()))
    with context.Pool(jobs, initializer=_settle, initargs=(waiting,)) as pool:
        yield lambda faults: pool.imap_unordered(_pass, faults)


def _copy_database(name: str) -> None:
    import psycopg
    from psycopg.sql import SQL, Identifier

    from runs import events

    source = events.direct_parameters()["dbname"]
    parameters: dict[str, Any] = {**events.direct_parameters(), "dbname": "postgres"}
    with psycopg.connect(**parameters, autocommit=True) as server:
        server.execute(SQL("CREATE DATABASE {} TEMPLATE {}").format(Identifier(name), Identifier(source)))


def _settle(waiting: SimpleQueue[Place]) -> None:
    """Be one place, for all passes that come to it."""
    global _place
    _place = waiting.get()
    enter(_place)


def _pass(fault: Fault | None) -> Outcome:
    from tests.chaos.sweep_case import Case

    assert _place is not None
    return Case(_place, fault).run()
