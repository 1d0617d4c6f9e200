"""Adapter states in storage: checkpoints people asked for and snapshots the worker restarts from.

Folders are named by ids, never by a user's name for them, and carry seq and fence, so that a worker
that lost a run cannot overwrite its successor's files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from django.core.files.base import File
from django.core.files.storage import FileSystemStorage, default_storage, storages

from gpuworker import scratch
from gpuworker.engine import checkpoints
from gpuworker.engine.adapters import AdapterState
from gpuworker.engine.exceptions import CheckpointError, EngineError
from gpuworker.fingerprints import fingerprint_of
from gpuworker.seats import Seat
from runs.services import blobs, storage_mark

Content = TypeVar("Content")


class StorageError(EngineError):
    """The disk or bucket failed; what lies there may be whole."""


def new_directory(kind: str, run_pk: int, seq: int, fence: int) -> str:
    """Return a fresh storage folder for a state of a run."""
    return f"{kind}/{run_pk}/{seq}-{fence}-{uuid.uuid4().hex[:8]}"


def store(state: AdapterState, directory: str, seat: Seat) -> int:
    """Write a state of the seat's run durably, with what it was computed with; returns its size in bytes.

    Raises:
        StorageError: the storage refuses; nothing of it is left, unless that is refused, too.
    """
    try:
        return _store(state, directory, seat)
    except (CheckpointError, OSError) as error:
        blobs.delete_folder(directory)  # not for good: the same name may be written again
        raise StorageError(f"the checkpoint cannot be written: {_reason(error)}") from error


def _store(state: AdapterState, directory: str, seat: Seat) -> int:
    write = partial(
        checkpoints.write, state, base_model=seat.run.base_model, fingerprint=fingerprint_of(seat.engine)
    )
    if isinstance(storages["default"], FileSystemStorage):
        storage_mark.check()
        path = Path(default_storage.path(directory))
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        return _size(path)
    with tempfile.TemporaryDirectory(prefix=scratch.prefix()) as temporary:
        path = Path(temporary) / "state"
        write(path)
        for file in sorted(path.iterdir()):
            with blobs.away(), file.open("rb") as content:
                default_storage.save(f"{directory}/{file.name}", File(content))
        return _size(path)


def fetch(directory: str) -> AdapterState:
    """Read a state back.

    Raises:
        CheckpointError: the files are missing, torn or of another form.
        StorageError: they cannot be read just now.
    """
    return _patiently(partial(_fetch, directory))


def local_folder(directory: str, copies: Path) -> Path:
    """Return where the files of a state lie on this machine; those of a bucket are copied below `copies`.

    Raises:
        CheckpointError: there are none.
        StorageError: they cannot be read just now.
    """
    if isinstance(storages["default"], FileSystemStorage):
        return Path(default_storage.path(directory))
    target = copies / directory
    if not target.is_dir():
        draft = Path(tempfile.mkdtemp(dir=copies))
        _patiently(partial(_download, directory, draft))
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.rename(target)
    return target


def fingerprint(directory: str) -> dict[str, str]:
    """Return what a state that `fetch` has read was computed with.

    Raises:
        CheckpointError: it was deleted meanwhile.
        StorageError: it cannot be read just now.
    """
    return _patiently(partial(_fingerprint, directory))


def _patiently(read: Callable[[], Content]) -> Content:
    try:
        return blobs.patiently(read)
    except FileNotFoundError as error:
        raise CheckpointError("the checkpoint lacks a file") from error
    except OSError as error:
        raise StorageError(f"the checkpoint cannot be read: {_reason(error)}") from error


def _fetch(directory: str) -> AdapterState:
    try:
        return _read(directory)
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


def _read(directory: str) -> AdapterState:
    if isinstance(storages["default"], FileSystemStorage):
        return checkpoints.read(Path(default_storage.path(directory)))
    with tempfile.TemporaryDirectory(prefix=scratch.prefix()) as temporary:
        _download(directory, Path(temporary))
        return checkpoints.read(Path(temporary))


def _download(directory: str, target: Path) -> None:
    with blobs.away():
        _, names = default_storage.listdir(directory)
        for name in names:
            with default_storage.open(f"{directory}/{name}") as source, (target / name).open("wb") as copy:
                shutil.copyfileobj(source, copy)


def _fingerprint(directory: str) -> dict[str, str]:
    with blobs.away(), default_storage.open(f"{directory}/{checkpoints.STATE_FILE}") as file:
        content: bytes = file.read()
    return {str(key): str(value) for key, value in json.loads(content).get("fingerprint", {}).items()}


def _reason(error: BaseException) -> str:
    """Return what the operating system said, without the names of this machine's folders."""
    cause = error if isinstance(error, OSError) else error.__cause__ or error
    return (cause.strerror or str(cause)).lower() if isinstance(cause, OSError) else str(cause)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())
