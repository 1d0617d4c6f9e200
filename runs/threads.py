"""Threads that talk to the database: how they start, wait for it, and end."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from django.db import (
    DatabaseError,
    InterfaceError,
    InternalError,
    OperationalError,
    close_old_connections,
    connections,
)
from psycopg.errors import ReadOnlySqlTransaction

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_RETRY_S: Final = 0.5


def database_thread(name: str, target: Callable[[], None]) -> threading.Thread:
    """Return a daemon thread, not yet started, that closes its database connections at the end.

    A worker with a dead thread would look alive and do nothing, so an unexpected error ends the
    process: a fresh one rebuilds everything from the log.
    """

    def run() -> None:
        try:
            target()
        except Exception:
            logger.exception("the %s thread failed; the process ends so that a fresh one starts", name)
            os._exit(3)
        finally:
            connections.close_all()

    return threading.Thread(target=run, name=name, daemon=True)


def until_reachable(action: Callable[[], Result]) -> Result:
    """Repeat a database action, which must be safe to repeat, for as long as the database is away or takes no writes."""
    while True:
        try:
            return action()
        except (OperationalError, InterfaceError) as error:
            close_old_connections()
            logger.warning("the database does not answer, trying again: %s", error)
        except InternalError as error:
            if not isinstance(error.__cause__, ReadOnlySqlTransaction):
                raise
            connections.close_all()  # another server may be the one that takes writes by now
            logger.warning("the database takes no writes, trying again: %s", error)
        time.sleep(_RETRY_S)


def with_connection(call: Callable[[], Result]) -> Result:
    """Make a database call in a thread that lives on: a connection that failed in it is not used again."""
    close_old_connections()
    try:
        return call()
    except (DatabaseError, InterfaceError):
        close_old_connections()
        raise
