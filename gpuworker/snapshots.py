"""Adapter states in storage: checkpoints people asked for and snapshots the worker restarts from.

Folders are named by ids, never by a user's name for them, and carry seq and fence, so that a worker
that lost a run cannot overwrite its successor's files.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from functools import partial
from pathlib import Path

from django.core.files.base import File
from django.core.files.storage import FileSystemStorage, default_storage, storages

from gpuworker.engine import checkpoints
from gpuworker.engine.adapters import AdapterState
from gpuworker.seats import Seat


def new_directory(kind: str, run_pk: int, seq: int, fence: int) -> str:
    """Return a fresh storage folder for a state of a run."""
    return f"{kind}/{run_pk}/{seq}-{fence}-{uuid.uuid4().hex[:8]}"


def store(state: AdapterState, directory: str, seat: Seat) -> int:
    """Write a state of the seat's run durably, with what it was computed with; returns its size in bytes."""
    write = partial(
        checkpoints.write, state, base_model=seat.run.base_model, fingerprint=seat.engine.fingerprint
    )
    if isinstance(storages["default"], FileSystemStorage):
        path = Path(default_storage.path(directory))
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        return _size(path)
    with tempfile.TemporaryDirectory(prefix="mintweb-") as temporary:
        path = Path(temporary) / "state"
        write(path)
        for file in sorted(path.iterdir()):
            with file.open("rb") as content:
                default_storage.save(f"{directory}/{file.name}", File(content))
        return _size(path)


def fetch(directory: str) -> AdapterState:
    """Read a state back.

    Raises:
        CheckpointError: the files are missing, torn or of another form.
    """
    if isinstance(storages["default"], FileSystemStorage):
        return checkpoints.read(Path(default_storage.path(directory)))
    with tempfile.TemporaryDirectory(prefix="mintweb-") as temporary:
        _, names = default_storage.listdir(directory)
        for name in names:
            with (
                default_storage.open(f"{directory}/{name}") as source,
                (Path(temporary) / name).open("wb") as target,
            ):
                shutil.copyfileobj(source, target)
        return checkpoints.read(Path(temporary))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())
