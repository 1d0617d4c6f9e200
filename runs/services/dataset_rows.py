"""The canonical rows of a dataset version, read one at a time from disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
from django.conf import settings
from django.core.files.storage import FileSystemStorage, default_storage, storages

from runs.exceptions import RequestInvalid
from runs.models import DatasetVersion
from runs.services import blobs

ROWS: Final = "rows.jsonl"
INDEX: Final = "rows.idx"
_IN_USE_S: Final = 3600


class RowReader:
    """Rows by number, with flat memory, from several threads if need be; close it, or use it in a `with` block."""

    def __init__(self, rows: Path, index: Path) -> None:
        self._offsets = np.memmap(index, dtype="<u8", mode="r")
        self._file = rows.open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        value: dict[str, Any] = orjson.loads(self.raw(row))
        return value

    def raw(self, row: int, *, limit: int | None = None) -> bytes:
        """Return a row as it is stored, or no more than its first `limit` bytes."""
        start, size = int(self._offsets[row]), self.size_bytes(row)
        return os.pread(self._file.fileno(), size if limit is None else min(size, limit), start)

    def size_bytes(self, row: int) -> int:
        """Return how long a row is as it is stored."""
        return int(self._offsets[row + 1] - self._offsets[row])

    def slice(self, start: int, end: int) -> list[dict[str, Any]]:
        """Return the rows from `start` up to, not including, `end`."""
        return [self[row] for row in range(max(start, 0), min(end, len(self)))]

    def close(self) -> None:
        """Let go of the files."""
        self._file.close()

    def __enter__(self) -> RowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_rows(version: DatasetVersion) -> RowReader:
    """Open the rows of a version that is ready.

    Raises:
        RequestInvalid: it has no rows: it is not checked yet, or waits for a choice, or was refused.
        OSError: the disk or the bucket fails, or is not the one that was used before.
    """
    try:
        return blobs.patiently(partial(_open, version))
    except FileNotFoundError:
        raise RequestInvalid(f"version {version.number} of the dataset has no rows (yet)") from None


def _open(version: DatasetVersion) -> RowReader:
    return RowReader(*(local_copy(f"{version.directory}/{name}") for name in (ROWS, INDEX)))


def local_copy(name: str) -> Path:
    """Return a stored file as a path: itself where storage is a folder, else a copy in the cache."""
    if isinstance(storages["default"], FileSystemStorage):
        return Path(default_storage.path(name))
    path = _cache_folder() / name
    if path.exists():
        os.utime(path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", delete=False) as copy:
        try:
            with blobs.away(), default_storage.open(name) as source:
                shutil.copyfileobj(source, copy, 1 << 20)
        except BaseException:
            Path(copy.name).unlink()
            raise
    Path(copy.name).replace(path)
    return path


def drop_copies(name: str) -> None:
    """Delete the cached copy of a stored file or folder, because it is no longer what is stored."""
    path = _cache_folder() / name
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def remove_unused_copies() -> None:
    """Delete the copies used longest ago until the cache is within its size; none that may be in use."""
    found = [(file.stat(), file) for file in _cache_folder().rglob("*") if file.is_file()]
    excess = sum(stat.st_size for stat, _ in found) - settings.CACHE_BYTES
    for stat, file in sorted(found, key=lambda one: one[0].st_mtime):
        if excess <= 0 or stat.st_mtime > time.time() - _IN_USE_S:
            return
        file.unlink(missing_ok=True)
        excess -= stat.st_size


def _cache_folder() -> Path:
    return Path(settings.DATA_DIR / "cache" / "storage")
