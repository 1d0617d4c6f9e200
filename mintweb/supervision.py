"""Keeps a set of programs running: starts them, restarts the ones that end, stops all in a given order.

Used by `manage.py up` alone, from its main thread (the kernel ends a child when the thread that started it ends).
Output goes straight into one log file per program, so a program never blocks on a slow terminal; what it logs
as a warning or worse is repeated on the terminal. Knows nothing of what the programs do.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

POLL_S = 0.1
RESTART_DELAYS_S = (0.2, 1.0, 2.0, 5.0, 10.0)  # by how often in a row it ended early; the last one repeats
STEADY_AFTER_S = 30.0  # a program that ran this long starts again with the first delay
READ_BYTES = 1024**2
LOG_LIMIT_BYTES = 32 * 1024**2
LOUD_LINE = re.compile(rb"^[\d:, -]{19,23} (WARNING|ERROR|CRITICAL) ")


@dataclass(frozen=True)
class Program:
    """One program to keep running."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_s: float = 10.0
    # Called before each start, to end what a crash left behind.
    prepare: Callable[[], object] = lambda: None


@dataclass
class _Child:
    program: Program
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    num_early_ends: int = 0
    start_at: float = 0.0
    log_offset: int = 0


class Supervisor:
    """Runs programs until told to stop; `say` receives one short line for the terminal at a time."""

    def __init__(self, log_dir: Path, *, say: Callable[[str], object]) -> None:
        self._log_dir = log_dir
        self._say = say
        self._children: dict[str, _Child] = {}
        log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)

    def start(self, program: Program) -> None:
        """Start a program and keep it running from now on."""
        child = _Child(program, self._log_dir / f"{program.name}.log")
        with contextlib.suppress(FileNotFoundError):
            child.log_offset = child.log.stat().st_size
        self._children[program.name] = child
        self._launch(child)

    def poll(self) -> None:
        """Restart what ended, once its delay is over, and repeat new warnings; call it often."""
        for child in self._children.values():
            self._repeat_warnings(child)
            if child.process is not None and child.process.poll() is not None:
                self._note_end(child, child.process)
            if child.process is None and time.monotonic() >= child.start_at:
                self._launch(child)

    def is_alive(self, name: str) -> bool:
        """Say whether a program's process exists at this moment."""
        process = self._children[name].process
        return process is not None and process.poll() is None

    def failing(self, *, num_ends: int) -> str | None:
        """Return the name of a program that ended this often in a row soon after its start, if there is one."""
        return next(
            (name for name, child in self._children.items() if child.num_early_ends >= num_ends), None
        )

    def last_line(self, name: str) -> str:
        """Return the last line that a program wrote."""
        log = self._children[name].log
        lines = (
            log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines() if log.exists() else []
        )
        return lines[-1].strip() if lines else "it wrote nothing"

    def stop(self, names: Iterable[str], *, hurry: Callable[[], bool] = lambda: False) -> None:
        """Send each its stop signal and wait; those that outlast their time, or when `hurry` says so, are killed."""
        children = [self._children.pop(name) for name in names if name in self._children]
        stopping = [(child, child.process) for child in children if child.process is not None]
        begin = time.monotonic()
        for child, process in stopping:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(child.program.stop_signal)
        for child, process in stopping:
            while process.poll() is None:
                if hurry() or time.monotonic() - begin > child.program.stop_timeout_s:
                    self._say(f"{child.program.name} did not stop in time and is killed")
                    process.kill()
                    process.wait()
                time.sleep(0.02)
            _kill_group(process)
            self._repeat_warnings(child)

    def _launch(self, child: _Child) -> None:
        child.program.prepare()
        with child.log.open("ab") as output:
            child.process = subprocess.Popen(
                child.program.command,
                env={**os.environ, **child.program.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C on the terminal reaches the supervisor alone
            )
        child.started_at = time.monotonic()

    def _note_end(self, child: _Child, process: subprocess.Popen[bytes]) -> None:
        _kill_group(process)
        lived_s = time.monotonic() - child.started_at
        child.num_early_ends = 1 if lived_s >= STEADY_AFTER_S else child.num_early_ends + 1
        delay_s = RESTART_DELAYS_S[min(child.num_early_ends, len(RESTART_DELAYS_S)) - 1]
        child.process, child.start_at = None, time.monotonic() + delay_s
        self._say(
            f"{child.program.name} ended ({_reason(process.returncode)}) and starts again in {delay_s:g} s; "
            f"its log is {child.log}"
        )

    def _repeat_warnings(self, child: _Child) -> None:
        try:
            size = child.log.stat().st_size
        except FileNotFoundError:
            return
        if size > LOG_LIMIT_BYTES:  # programs append, so they go on at the new end of the emptied file
            shutil.copyfile(child.log, child.log.with_suffix(".log.1"))
            os.truncate(child.log, 0)
            size = 0
        if size <= child.log_offset:
            child.log_offset = min(child.log_offset, size)
            return
        with child.log.open("rb") as file:
            file.seek(child.log_offset)
            block = file.read(READ_BYTES)
        end = block.rfind(b"\n") + 1 or (len(block) if len(block) == READ_BYTES else 0)
        child.log_offset += end
        for line in block[:end].splitlines():
            if LOUD_LINE.match(line):
                self._say(f"{child.program.name}: {line.decode('utf-8', errors='replace')[:300]}")


def dying_with_parent(command: Iterable[str], *, death_signal: str = "KILL") -> tuple[str, ...]:
    """Return a command that the kernel ends when the process that started it ends, however that happens."""
    setpriv = shutil.which("setpriv")
    return (*((setpriv, "--pdeathsig", death_signal) if setpriv else ()), *command)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _reason(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    return f"signal {signal.Signals(-returncode).name}"
