"""Named points at which a test ends, freezes or fails this process; a point that is not armed does nothing.

A list of them is `name:action@n` with commas between: `after_compute:kill@3` kills the process when it
comes to that point for the third time. Knows nothing of the rest of the worker.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from typing import Final

NAMES: Final = (
    "before_compute",
    "after_compute",
    "before_commit",
    "after_answer",
    "after_commit",
    "snapshot_written",
    "snapshot_renamed",
    "during_replay",
)
_ITEM: Final = re.compile(r"([a-z_]+):(kill|stop|raise)@([1-9][0-9]{0,8})")
_lock = threading.Lock()
_armed: dict[str, tuple[str, int]] = {}


class FailpointReached(Exception):
    """A test asked for this failure."""


def arm(text: str) -> None:
    """Replace all armed points by those in the list.

    Raises:
        ValueError: the list names an unknown point or action.
    """
    armed: dict[str, tuple[str, int]] = {}
    for item in filter(None, text.split(",")):
        match = _ITEM.fullmatch(item)
        if match is None or match[1] not in NAMES:
            raise ValueError(f"failpoint {item!r} is not {'|'.join(NAMES)}:kill|stop|raise@number")
        armed[match[1]] = (match[2], int(match[3]))
    with _lock:
        _armed.clear()
        _armed.update(armed)


def reach(name: str) -> None:
    """Say that the process has come to a point.

    Raises:
        FailpointReached: a test asked for it.
    """
    if name in _armed and (action := _count(name)):
        _act(action, name)


def _count(name: str) -> str:
    """Count one arrival; returns what is to be done when it was the last one to wait for."""
    with _lock:
        action, left = _armed[name]
        if left > 1:
            _armed[name] = (action, left - 1)
            return ""
        del _armed[name]
        return action


def _act(action: str, name: str) -> None:
    if action == "raise":
        raise FailpointReached(name)
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
