"""Runs one call many times at once, each in a thread with a database connection of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from django.db import connection

Result = TypeVar("Result")


def race(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """Start all calls at the same moment and return what each returned."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Result]) -> Result:
        connection.ensure_connection()
        start.wait(timeout=30)
        try:
            return call()
        finally:
            connection.close()

    with ThreadPoolExecutor(max_workers=len(calls)) as threads:
        return list(threads.map(run, calls))
