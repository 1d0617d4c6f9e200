"""The web process of a test."""

from __future__ import annotations

import multiprocessing
import urllib.request
from multiprocessing.process import BaseProcess
from urllib.parse import quote

import pytest
from django.db import connection

from tests.up.instances import free_port, wait_for

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.pages.live.web_process", "tests.pages.live.server"])
_fresh = multiprocessing.get_context("spawn")


class Server:
    """The web process on a port of its own; it can be stopped and started again.

    It is forked from one that has imported everything and read the settings, which takes a tenth of a second instead
    of three. A `fresh` one begins as people's do, with this process's environment of now.
    """

    def __init__(self, *, fresh: bool = False) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.was_away = False
        # Words of the browser's own about refusals that a test asks for.
        self.refused: tuple[str, ...] = ()
        self._context = _fresh if fresh else _forks
        self._process: BaseProcess | None = None

    def start(self) -> None:
        """Start it and wait for it."""
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("DATABASE_URL", _database_url())
            self._process = self._context.Process(target=_serve, args=(self.port,))
            self._process.start()
        wait_for(self._answers, 120)

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self.was_away = True
            self._process.kill()
            self._process.join()
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.is_alive(), "the server has ended"
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=30):
                return True
        except OSError:
            return False


def _serve(port: int) -> None:
    from tests.pages.live import web_process  # reads the settings

    web_process.serve(port)


def _database_url() -> str:
    database = connection.settings_dict
    return f"postgresql://{database['USER']}@/{database['NAME']}?host={quote(database['HOST'], safe='/')}"
