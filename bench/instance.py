"""A mintweb of the benchmark's own: `manage.py up` in a temporary data folder on a free port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from bench.companion import ROOT

API_KEY = "tml-benchmark-key"
_READY_LINE = "Ctrl-C stops everything."
_START_TIMEOUT_S = 120


class Instance:
    """Runs for the length of a `with` block."""

    def __init__(self, data_dir: Path, **settings: str) -> None:
        self.data_dir = data_dir
        self._port = free_port()
        self.address = f"http://127.0.0.1:{self._port}"
        self._output = data_dir.with_name("up.log")
        self._settings = settings

    @property
    def sdk_env(self) -> dict[str, str]:
        """What a client script needs to reach it."""
        return {"TINKER_BASE_URL": self.address, "TINKER_API_KEY": API_KEY, "TINKER_TELEMETRY": "0"}

    def __enter__(self) -> Instance:
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "manage.py", "up"], cwd=ROOT, env=self._env(), stdout=output, stderr=output
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while _READY_LINE not in self._output.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise RuntimeError(f"mintweb did not start:\n{self._output.read_text()}")
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(120)

    def _env(self) -> dict[str, str]:
        ours = ("MINTWEB_", "DATABASE_URL", "REDIS_URL", "DJANGO_SETTINGS_MODULE")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return {
            **kept,
            "MINTWEB_DATA_DIR": str(self.data_dir),
            "MINTWEB_PORT": str(self._port),
            "MINTWEB_DEVICE": "cpu",
            "MINTWEB_DTYPE": "float32",
            "MINTWEB_API_KEY": API_KEY,
            **self._settings,
        }


def set_up_django(instance: Instance) -> None:
    """Let this process use the instance's database and storage, through models and services."""
    import django

    os.environ |= {"MINTWEB_DATA_DIR": str(instance.data_dir), "DJANGO_SETTINGS_MODULE": "mintweb.settings"}
    for name in ("DATABASE_URL", "REDIS_URL"):
        os.environ.pop(name, None)
    django.setup()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
