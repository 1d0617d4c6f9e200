"""A whole mintweb of real processes that may be killed at will: servers, web, workers; what dies is started again."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg

from mintweb import embedded

_TICK_S: Final = 0.02
_PATIENCE_S: Final = 180.0
_ROOT: Final = Path(__file__).resolve().parent.parent.parent


class StageError(Exception):
    """Something did not come about in all this time; the message says what."""


@dataclass(kw_only=True)
class Process:
    """A place for one child of the nursery; `pid` is 0 while nobody is in it."""

    role: str
    name: str
    pid: int = 0
    is_frozen: bool = False


@dataclass(frozen=True, kw_only=True)
class Holding:
    """A run that a worker held at some moment, and under which fence."""

    run_pk: int
    fence: int


class Stage:
    """Everything that runs; the driver's one thread calls `tend` whenever it has nothing else to do."""

    def __init__(self, folder: Path, *, engine: str, num_workers: int, pace: Mapping[str, float]) -> None:
        self.folder = folder
        self.pace = pace
        self.exits: Counter[str] = Counter()
        self.web = Process(role="web", name="web")
        self.workers = [Process(role="worker", name=f"gpu{index}") for index in range(num_workers)]
        self._engine = engine
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._nursery: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._is_ending = False
        self._wakings: list[tuple[float, int]] = []
        self._connection: psycopg.Connection[Any] | None = None

    # What runs ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def databases(self) -> Iterator[None]:
        """Run PostgreSQL and Redis."""
        (self.folder / "logs").mkdir(mode=0o700, exist_ok=True)
        try:
            self.start_redis()
            self.start_postgres()
            yield
        finally:
            self._hang_up()
            for name in list(self._servers):
                self.end_server(name, signal.SIGTERM if name == "redis" else signal.SIGINT)

    @contextlib.contextmanager
    def programs(self) -> Iterator[None]:
        """Run the web server and the workers."""
        self._is_ending = False
        with (self.folder / "logs" / "nursery.log").open("ab") as log:
            self._nursery = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.nursery"],
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        os.set_blocking(self._nursery.stdout.fileno(), False)
        try:
            self.until(lambda: all(process.pid for process in self._processes), what="every process is born")
            yield
        finally:
            self._nursery.stdin.close()
            self._nursery.wait()
            self._nursery.stdout.close()

    def end_programs(self) -> None:
        """Ask every program to end, as an operator does, and wait for it."""
        self._is_ending = True
        for process in self._processes:
            if process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)
                    os.kill(process.pid, signal.SIGTERM)
        self.until(
            lambda: not any(process.pid for process in self._processes), what="every program has ended"
        )

    def start_redis(self) -> None:
        """Start Redis and wait for it."""
        self._servers["redis"] = self._start(embedded.prepare_redis(self.folder), "redis")
        embedded.wait_for_redis(self.folder)

    def start_postgres(self) -> None:
        """Start PostgreSQL, on what a crash may have left, and wait for it."""
        server = self._servers["postgres"] = self._start(embedded.prepare_postgres(self.folder), "postgres")
        embedded.wait_for_postgres(self.folder, is_alive=lambda: server.poll() is None)

    def end_server(self, name: str, how: signal.Signals) -> None:
        """End a server by a signal and wait for its end."""
        server = self._servers.pop(name)
        server.send_signal(how)
        server.wait(60)

    # Time ---------------------------------------------------------------------------------------

    def tend(self) -> None:
        """Hear what the nursery says for a moment: who ended is started again. Wake whose time has come."""
        assert self._nursery is not None
        assert self._nursery.stdout is not None
        readable, _, _ = select.select([self._nursery.stdout], [], [], _TICK_S)
        if readable:
            received = os.read(self._nursery.stdout.fileno(), 65536)
            if not received:
                raise StageError("the nursery has ended; see logs/nursery.log")
            *lines, self._unread = (self._unread + received).split(b"\n")
            for line in lines:
                self._hear(json.loads(line))
        for waking in [one for one in self._wakings if one[0] <= time.monotonic()]:
            self._wakings.remove(waking)
            self._wake(waking[1])

    def until(self, condition: Callable[[], object], *, what: str, patience_s: float = _PATIENCE_S) -> None:
        """Tend until the condition holds.

        Raises:
            StageError: it does not in time.
        """
        deadline = time.monotonic() + patience_s
        while not condition():
            if time.monotonic() > deadline:
                raise StageError(f"not within {patience_s:.0f} s: {what}")
            self.tend()

    def wait(self, seconds: float) -> None:
        """Tend for some time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.tend()

    # Processes ----------------------------------------------------------------------------------

    def awake_workers(self) -> list[Process]:
        """Return the workers that run."""
        return [process for process in self.workers if process.pid and not process.is_frozen]

    def num_frozen(self) -> int:
        """Return how many workers sleep."""
        return sum(process.is_frozen for process in self.workers)

    def kill(self, process: Process) -> None:
        """End a process without a word; one that has ended just now is not yet known to."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)

    def freeze(self, process: Process, *, lasts_s: float) -> None:
        """Stop a process (or know that it has stopped) and wake it later."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP)
            process.is_frozen = True
            self._wakings.append((time.monotonic() + lasts_s, process.pid))

    def arm(self, process: Process, failpoints: str) -> None:
        """Have a running worker die or freeze at a point; an empty text takes that back."""
        target = self.folder / "arms" / str(process.pid)
        target.parent.mkdir(exist_ok=True)
        draft = target.with_suffix(".draft")
        draft.write_text(failpoints)
        draft.rename(target)

    # Rows ---------------------------------------------------------------------------------------

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Return what the database answers; it is waited for."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                if self._connection is None:
                    self._connection = psycopg.connect(
                        embedded.database_url(self.folder), autocommit=True, connect_timeout=5
                    )
                return self._connection.execute(statement, values).fetchall()
            except psycopg.OperationalError as error:
                self._hang_up()
                if time.monotonic() > deadline:
                    raise StageError(f"the database does not answer: {error}") from error
                time.sleep(_TICK_S)

    def holdings(self) -> dict[int, list[Holding]]:
        """Return what each live worker's process holds."""
        found: dict[int, list[Holding]] = {process.pid: [] for process in self.workers if process.pid}
        for pid, run_pk, fence in self.rows(
            "SELECT w.pid, r.id, r.fence FROM runs_worker w JOIN runs_trainingrun r ON r.worker_id = w.id"
            " WHERE w.stopped_at IS NULL ORDER BY r.id"
        ):
            if pid in found:
                found[pid].append(Holding(run_pk=run_pk, fence=fence))
        return found

    # Below --------------------------------------------------------------------------------------

    @property
    def _processes(self) -> list[Process]:
        return [self.web, *self.workers]

    def _start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _hear(self, said: dict[str, Any]) -> None:
        if "ready" in said:
            for process in self._processes:
                self._order(process)
        elif "born" in said:
            next(one for one in self._processes if one.name == said["id"]).pid = said["born"]
        else:
            process = next(one for one in self._processes if one.pid == said["dead"])
            self.exits[f"{process.role} {said['status']}"] += 1
            process.pid, process.is_frozen = 0, False
            if not self._is_ending:
                self._order(process)

    def _order(self, process: Process) -> None:
        order = {
            "id": process.name,
            "name": process.name,
            "role": process.role,
            "engine": self._engine,
            "pace": self.pace,
            "failpoints": "",
            "log": str(self.folder / "logs" / f"{process.name}.log"),
        }
        assert self._nursery is not None
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(json.dumps(order).encode() + b"\n")
        self._nursery.stdin.flush()

    def _wake(self, pid: int) -> None:
        process = next((one for one in self.workers if one.pid == pid), None)
        if process is not None:
            process.is_frozen = False
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
