"""The supervisor, with small shell programs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mintweb import supervision
from mintweb.supervision import Program, Supervisor, dying_with_parent

from .instances import command, wait_for


class Watched(Supervisor):
    """A supervisor that keeps what it said, and waits while it works."""

    def __init__(self, log_dir: Path) -> None:
        self.said: list[str] = []
        super().__init__(log_dir, say=self.said.append)

    def wait_until_log_has(self, name: str, text: str, *, times: int = 1, timeout_s: float = 10) -> None:
        log = self._log_dir / f"{name}.log"

        def found() -> bool:
            self.poll()
            return log.exists() and log.read_text().count(text) >= times

        wait_for(found, timeout_s, lambda: str(self.said))


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path / "logs")
    yield watched
    watched.stop(list(watched._children), hurry=lambda: True)


def shell(name: str, script: str, *, stop_timeout_s: float = 5) -> Program:
    return Program(name, dying_with_parent(["sh", "-c", script]), stop_timeout_s=stop_timeout_s)


def test_it_restarts_a_program_that_ends(supervisor: Watched) -> None:
    supervisor.start(shell("short", "echo begun; exit 3"))
    supervisor.wait_until_log_has("short", "begun", times=3)
    assert "short ended (exit code 3) and starts again in 0.2 s" in supervisor.said[0]
    assert "starts again in 1 s" in supervisor.said[1]
    assert supervisor.failing(num_ends=2) == "short"
    assert supervisor.last_line("short") == "begun"


def test_it_restarts_a_killed_program_within_seconds(supervisor: Watched) -> None:
    supervisor.start(shell("long", "echo pid $$; exec sleep 100"))
    supervisor.wait_until_log_has("long", "pid")
    begin = time.monotonic()
    process = supervisor._children["long"].process
    assert process is not None
    process.kill()
    supervisor.wait_until_log_has("long", "pid", times=2)
    assert time.monotonic() - begin < 3
    assert "signal SIGKILL" in supervisor.said[0]


def test_it_repeats_warnings_on_the_terminal_once(supervisor: Watched) -> None:
    line = "2026-01-01 10:00:00,123 WARNING runs: disk is nearly full"
    info = "2026-01-01 10:00:00,123 INFO runs: fine"
    supervisor.start(shell("talker", f"echo '{info}'; echo '{line}'; echo end; exec sleep 100"))
    supervisor.wait_until_log_has("talker", "end")
    supervisor.poll()
    supervisor.poll()
    assert supervisor.said == [f"talker: {line}"]


def test_it_stops_with_the_programs_signal_and_waits(supervisor: Watched) -> None:
    supervisor.start(
        shell("polite", "trap 'sleep 0.3; echo saved; exit 0' TERM; echo on; while :; do sleep 0.05; done")
    )
    supervisor.wait_until_log_has("polite", "on")
    supervisor.stop(["polite"])
    assert supervisor._log_dir.joinpath("polite.log").read_text() == "on\nsaved\n"
    assert supervisor.said == []


def test_it_kills_what_does_not_stop_with_all_that_it_started(supervisor: Watched) -> None:
    supervisor.start(
        shell("stubborn", "trap '' TERM; sleep 100 & echo child $!; wait; sleep 100", stop_timeout_s=0.3)
    )
    supervisor.wait_until_log_has("stubborn", "child")
    grandchild = int(supervisor.last_line("stubborn").split()[1])
    supervisor.stop(["stubborn"])
    assert supervisor.said == ["stubborn did not stop in time and is killed"]
    wait_for(lambda: not command(grandchild), 5)


def test_a_log_does_not_grow_without_end(supervisor: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "LOG_LIMIT_BYTES", 1000)
    supervisor.start(shell("writer", "while :; do echo 0123456789; sleep 0.001; done"))
    log = supervisor._log_dir / "writer.log"

    def turned() -> bool:
        supervisor.poll()
        return log.with_suffix(".log.1").exists() and 0 < log.stat().st_size < 1000

    wait_for(turned, 10)
    assert not any(byte == 0 for byte in log.read_bytes())


def test_a_program_ends_with_a_killed_supervisor(tmp_path: Path) -> None:
    supervisor_pid = os.fork()
    if supervisor_pid == 0:
        Supervisor(tmp_path, say=lambda line: None).start(shell("orphan", "echo $$; exec sleep 100"))
        os.kill(os.getpid(), signal.SIGKILL if wait_for_text(tmp_path / "orphan.log") else signal.SIGTERM)
    os.waitpid(supervisor_pid, 0)
    pid = int((tmp_path / "orphan.log").read_text())
    wait_for(lambda: not command(pid), 5)


def wait_for_text(file: Path) -> bool:
    wait_for(lambda: file.exists() and file.read_text().endswith("\n"), 10)
    return True
