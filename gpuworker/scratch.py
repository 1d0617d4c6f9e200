"""Temporary folders of this process. Those of processes that were killed go when the next worker starts."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Final

_NAME: Final = re.compile(r"mintweb-worker-(\d+)-.*")


def prefix() -> str:
    """Return how the names of this process's folders begin."""
    return f"mintweb-worker-{os.getpid()}-"


def remove_left() -> None:
    """Remove the folders of this user's processes that are no more."""
    for folder in Path(tempfile.gettempdir()).glob("mintweb-worker-*"):
        match = _NAME.fullmatch(folder.name)
        if match is not None and not _is_alive(int(match[1])) and _is_own(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):  # no process's number, or another user's
        return True
    return True


def _is_own(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
