"""Starts the real `manage.py up` as people do, in a folder and on a port of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
READY_LINE = "Ctrl-C stops everything."
_LANES = 16


class Instance:
    """One `manage.py up` on a data folder; start and stop it as often as needed."""

    def __init__(self, data_dir: Path, **settings: str) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.output_file = data_dir.with_name(f"{data_dir.name}.output")
        self.env = clean_environment(
            MINTWEB_DATA_DIR=str(data_dir), MINTWEB_PORT=str(self.port), MINTWEB_DEVICE="cpu", **settings
        )
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Start it without waiting."""
        with self.output_file.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "up"], cwd=ROOT, env=self.env, stdout=output, stderr=output
            )

    def start(self, *, timeout_s: float = 200) -> float:
        """Start it and return how many seconds passed until it said that it is ready."""
        begin = time.monotonic()
        self.launch()
        wait_for(lambda: READY_LINE in self.output or self.returncode is not None, timeout_s, self.describe)
        assert READY_LINE in self.output, self.describe()
        return time.monotonic() - begin

    def stop(self, number: int = signal.SIGTERM, *, timeout_s: float = 100) -> int:
        """Send it a signal and return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    @property
    def returncode(self) -> int | None:
        """Its exit code, if it has ended."""
        return None if self.process is None else self.process.poll()

    @property
    def output(self) -> str:
        """What it has printed since its start."""
        return self.output_file.read_text(encoding="utf-8")

    def stored(self, folder: str) -> dict[str, bytes]:
        """Return the files in a folder of its storage."""
        return {file.name: file.read_bytes() for file in (self.data_dir / "storage" / folder).iterdir()}

    def describe(self) -> str:
        """Tell its output and the ends of its logs, for a failed test."""
        logs = [
            f"--- {log}\n{log.read_text()[-1500:]}" for log in sorted((self.data_dir / "logs").glob("*.log"))
        ]
        return "\n".join([self.output, *logs])

    def processes(self, part: str = "") -> list[int]:
        """Return the living processes that were started for this data folder and have `part` in their command."""
        mark = f"MINTWEB_DATA_DIR={self.data_dir}".encode()
        folder = str(self.data_dir).encode()  # Redis writes its title over its environment
        ours = [pid for pid in all_processes() if mark in environment(pid) or folder in command(pid)]
        return [pid for pid in ours if part.encode() in command(pid)]


def all_processes() -> list[int]:
    """Return the processes that have not ended."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if command(pid)]  # a zombie has no command line


def environment(pid: int) -> list[bytes]:
    """Return the variables that a process was started with."""
    return read(pid, "environ").split(b"\0")


def command(pid: int) -> bytes:
    """Return a process's command line."""
    return read(pid, "cmdline").replace(b"\0", b" ")


def read(pid: int, name: str) -> bytes:
    """Return a file of a process that may end at any time."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def clean_environment(**settings: str) -> dict[str, str]:
    """Return this process's environment without any setting of mintweb, and with these."""
    ours = ("MINTWEB_", "DATABASE_URL", "REDIS_URL", "DJANGO_SETTINGS_MODULE")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | settings


def free_port() -> int:
    """Return a TCP port that nobody listens on, below those that outgoing connections get while it is not in use.

    Each of the processes that run tests beside each other has ports of its own: between this look and the use of
    a port another one would take it now and then.
    """
    lane = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _LANES
    while True:
        port = 10_000 + secrets.randbelow(20_000 // _LANES) * _LANES + lane
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def is_quiet() -> bool:
    """Say whether what a test times is its own: nobody else has kept this machine's processors busy."""
    return max(os.getloadavg()[:2]) < (os.cpu_count() or 1)


def wait_for(condition: Callable[[], object], timeout_s: float, describe: Callable[[], str] = str) -> None:
    """Return when the condition holds; fail the test when it does not within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {describe()}"
        time.sleep(0.05)
