"""One pass of the reference scenario with one broken call, from an empty database to the verdict."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from tests.chaos import sweep_script, sweep_verdict
from tests.chaos.sweep_calls import Fault
from tests.chaos.sweep_processes import Place, bear

_PASS_S: Final = 90.0
_END_S: Final = 20.0
_LASTS_S: Final = 0.5  # how long a process goes on with everything of a kind broken before it is ended
_TICK_S: Final = 0.004
_LOG_LINES: Final = 60


@dataclass(kw_only=True)
class Outcome:
    """What came of a pass. `failed_cleanly` counts operations that were answered with an error of the server's."""

    fault: Fault | None
    problems: list[str] = field(default_factory=list)
    blown: dict[str, Any] | None = None
    failed_cleanly: list[str] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    calls: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    num_ops: int = 0
    seconds: float = 0.0
    logs: str = ""


class Stuck(Exception):
    """Something did not come about in time."""


class Case:
    """Runs one pass at a place; used once."""

    def __init__(self, place: Place, fault: Fault | None) -> None:
        self._place = place
        self._fault = fault
        self._pids: dict[str, int] = {}
        self._blown_at = 0.0
        self._is_over = False
        self._is_healed = False
        self.outcome = Outcome(fault=fault)

    def run(self) -> Outcome:
        """Do it all."""
        began = time.monotonic()
        self._clear()
        try:
            self._disturbed()
            self._calm()
        except Stuck as problem:
            self.outcome.problems.append(f"stuck: {problem}")
            self._dump_stacks()
        finally:
            for role in list(self._pids):
                self._kill(role)
        self._read_blown()
        if not self.outcome.problems:
            notes = sweep_script.read(self._place.notes)
            sweep_verdict.judge(self.outcome, notes)
        self.outcome.seconds = time.monotonic() - began
        if self.outcome.problems:
            self.outcome.logs = self._logs()
        return self.outcome

    def _disturbed(self) -> None:
        """Let the client do the first half, with the broken call, and end the processes as an operator does."""
        for role in ("worker", "web", "client"):
            self._pids[role] = bear(role, self._place, self._fault)
        self._until(self._place.halfway.exists, what="the client's first half")
        self._is_over = True
        self._end_well()
        for role in ("worker", "web"):
            if self._place.calls(role).exists():
                self.outcome.calls[role] = json.loads(self._place.calls(role).read_text())
        sweep_verdict.judge_leftovers(self.outcome, self._place, when="after the first half")

    def _calm(self) -> None:
        """Let the client do the second half with fresh processes, which bring every run back from what was kept."""
        self._fault = None
        for role in ("worker", "web"):
            self._pids[role] = bear(role, self._place, None)
        self._place.go_on.touch()
        self._until(lambda: "client" not in self._pids, what="the client's second half")
        self._end_well()
        sweep_verdict.judge_leftovers(self.outcome, self._place, when="at the end")

    def _clear(self) -> None:
        shutil.rmtree(self._place.folder, ignore_errors=True)
        self._place.storage.mkdir(parents=True)
        sweep_verdict.empty_database()

    # Processes ----------------------------------------------------------------------------------

    def _until(self, condition: Callable[[], bool], *, what: str) -> None:
        deadline = time.monotonic() + _PASS_S
        while not condition():
            self._tend()
            if time.monotonic() > deadline:
                raise Stuck(f"{what} does not come to its end")
            time.sleep(_TICK_S)

    def _tend(self) -> None:
        """Start again what has ended; end what has been broken for long enough."""
        for role in self._ended():
            if role != "client":
                self._pids[role] = bear(role, self._place, None if self._has_blown() else self._fault)
        fault = self._fault
        if fault is not None and fault.mode == "forever" and fault.library != "redis" and not self._is_over:
            is_due = self._has_blown() and time.monotonic() - self._blown_at > _LASTS_S
            if is_due and fault.role in self._pids:
                self._is_over = True
                self._end(fault.role, must_end_well=False)
                self._is_healed = True
                self._pids[fault.role] = bear(fault.role, self._place, None)

    def _has_blown(self) -> bool:
        if not self._blown_at and self._place.blown.exists():
            self._blown_at = time.monotonic()
        return bool(self._blown_at)

    def _ended(self) -> list[str]:
        """Return the roles whose process has ended since the last call."""
        ended = []
        for role, pid in list(self._pids.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._pids[role]
                self.outcome.exits.append(f"{role} {os.waitstatus_to_exitcode(status)}")
                ended.append(role)
        return ended

    def _end_well(self) -> None:
        """Ask worker and web to end; the worker first, as its last words go to nobody."""
        for role in ("worker", "web"):
            if role in self._pids:
                self._end(role, must_end_well=True)

    def _end(self, role: str, *, must_end_well: bool) -> None:
        os.kill(self._pids[role], signal.SIGTERM)
        began = time.monotonic()
        while role in self._pids:
            self._ended()
            may_hang = not must_end_well or self._is_broken_for_ever(role)
            if role in self._pids and time.monotonic() - began > (_LASTS_S if may_hang else _END_S):
                if not may_hang:
                    raise Stuck(f"the {role} does not end when it is asked to")
                self._kill(role)
                return
            time.sleep(_TICK_S)

    def _is_broken_for_ever(self, role: str) -> bool:
        """Return whether a process waits for something that never comes, rightly, until it is killed."""
        fault = self._fault
        is_its = fault is not None and fault.mode == "forever" and fault.role == role
        return is_its and not self._is_healed and self._has_blown()

    def _kill(self, role: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pids[role], signal.SIGKILL)
        os.waitpid(self._pids.pop(role), 0)
        self.outcome.exits.append(f"{role} -9")

    # Words --------------------------------------------------------------------------------------

    def _read_blown(self) -> None:
        if self._place.blown.exists():
            self.outcome.blown = json.loads(self._place.blown.read_text())

    def _dump_stacks(self) -> None:
        for pid in self._pids.values():
            os.kill(pid, signal.SIGUSR1)
        time.sleep(0.3)

    def _logs(self) -> str:
        parts = []
        for role in ("web", "worker", "client"):
            log = self._place.log(role)
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            parts += [f"--- {role}", *lines[-_LOG_LINES:]]
        return "\n".join(parts)
