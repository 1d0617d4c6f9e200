"""The web process of a test."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from urllib.parse import quote

from django.conf import settings
from django.db import connection

from tests.up.instances import free_port, wait_for


class Server:
    """The web process on a port of its own; it can be stopped and started again."""

    def __init__(self) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.was_away = False
        # Words of the browser's own about refusals that a test asks for.
        self.refused: tuple[str, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait for it."""
        database = connection.settings_dict
        url = f"postgresql://{database['USER']}@/{database['NAME']}?host={quote(database['HOST'], safe='/')}"
        command = [sys.executable, "-m", "uvicorn", "mintweb.asgi:application", "--port", str(self.port)]
        self._process = subprocess.Popen(
            [*command, "--log-level", "warning", "--no-access-log"],
            env={**os.environ, "DATABASE_URL": url},
            cwd=settings.BASE_DIR,
        )
        wait_for(self._answers, 120)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the server has ended"
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=30):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self.was_away = True
            self._process.kill()
            self._process.wait()
            self._process = None
