"""Threads that talk to the database close their connections when they end."""

from __future__ import annotations

import threading
from collections.abc import Callable

from django.db import connections


def database_thread(name: str, target: Callable[[], None]) -> threading.Thread:
    """Return a daemon thread, not yet started, that closes its database connections at the end."""

    def run() -> None:
        try:
            target()
        finally:
            connections.close_all()

    return threading.Thread(target=run, name=name, daemon=True)
