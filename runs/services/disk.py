"""What mintweb's data takes by kind, and what is left of the volume.

Rows know their sizes; what no row knows is measured by housekeeping, which may walk over many files, and
kept in a file. A page never walks.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from django.conf import settings
from django.core.cache import cache
from django.core.files.storage import FileSystemStorage, default_storage, storages
from django.db import connection
from django.db.models import Sum

from runs.models import DatasetVersion, Snapshot
from runs.services import blobs, tallies

_LOW_SHARE: Final = 0.10
_LOW_BYTES: Final = 2 * 1024**3
_MEASURE_EVERY_S: Final = 600.0
_KEPT_S: Final = 15
_LOCAL_HOSTS: Final = ("", "localhost", "127.0.0.1", "::1")
_CACHE_KEY: Final = "disk-of-rows"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of data; `share` and `offset` place it on a bar of 100 units for the whole volume.

    The share is 0 for what lies elsewhere, as in object storage.
    """

    kind: str
    label: str
    size_bytes: int
    share: float
    offset: float


@dataclass(frozen=True, kw_only=True)
class DiskUsage:
    """The disk meter: what mintweb has, what others have (`other_`), and what is free of the data folder's volume."""

    parts: list[Part]
    used_bytes: int
    free_bytes: int
    volume_bytes: int
    other_share: float
    other_offset: float
    is_low: bool


def usage() -> DiskUsage:
    """Return what mintweb's data takes and what is free; cheap enough for a page."""
    volume = shutil.disk_usage(settings.DATA_DIR)
    parts: list[Part] = []
    offset = 0.0
    for kind, label, size, is_here in _kinds():
        share = 100.0 * size / volume.total if is_here else 0.0
        parts.append(Part(kind=kind, label=label, size_bytes=size, share=share, offset=offset))
        offset += share
    taken = 100.0 * (volume.total - volume.free) / volume.total
    return DiskUsage(
        parts=parts,
        used_bytes=sum(part.size_bytes for part in parts),
        free_bytes=volume.free,
        volume_bytes=volume.total,
        other_share=max(taken - offset, 0.0),
        other_offset=offset,
        is_low=volume.free < max(_LOW_BYTES, _LOW_SHARE * volume.total),
    )


def measure() -> None:
    """Measure what no row knows, unless that was done a short while ago."""
    file = _file()
    if file.exists() and time.time() - file.stat().st_mtime < _MEASURE_EVERY_S:
        return
    data = Path(settings.DATA_DIR)
    folders = {"caches": data / "cache", "uploads": data / "uploads", "logs": Path(settings.LOG_DIR)}
    if isinstance(storages["default"], FileSystemStorage):
        folders["payloads"] = Path(default_storage.path(blobs.PAYLOADS))
        folders["datasets"] = Path(default_storage.path("datasets"))
    sizes = {kind: sum(_sizes(folder)) for kind, folder in folders.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".tmp-", delete=False) as temporary:
        json.dump(sizes, temporary)
    os.replace(temporary.name, file)


def _kinds() -> list[tuple[str, str, int, bool]]:
    """Return kind, label, bytes, and whether they are on the volume of the data folder."""
    rows, files = _of_rows(), _measured()
    is_local = isinstance(storages["default"], FileSystemStorage)
    host = str(connection.settings_dict["HOST"])
    has_database = host.startswith("/") or host in _LOCAL_HOSTS
    return [
        ("checkpoints", "Checkpoints", rows["checkpoints"], is_local),
        ("datasets", "Datasets", max(rows["datasets"], files.get("datasets", 0)), is_local),
        ("recovery", "Recovery states", rows["snapshots"], is_local),
        ("payloads", "Operation payloads", files.get("payloads", 0), is_local),
        ("caches", "Caches and uploads", files.get("caches", 0) + files.get("uploads", 0), True),
        ("database", "Database and logs", rows["database"] * has_database + files.get("logs", 0), True),
    ]


def _of_rows() -> dict[str, int]:
    known: dict[str, int] | None = cache.get(_CACHE_KEY)
    if known is not None:
        return known
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_database_size(current_database())")
        (database,) = cursor.fetchone()
    sizes = {
        "checkpoints": tallies.checkpoint_bytes(),
        "snapshots": _total(Snapshot),
        "datasets": _total(DatasetVersion),
        "database": int(database),
    }
    cache.set(_CACHE_KEY, sizes, _KEPT_S)
    return sizes


def _total(model: type[Snapshot | DatasetVersion]) -> int:
    return int(model.objects.aggregate(total=Sum("size_bytes"))["total"] or 0)


def _measured() -> dict[str, int]:
    """Return what was measured last; in an instance's first minute there is nothing."""
    try:
        sizes: Any = json.loads(_file().read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {str(kind): int(size) for kind, size in sizes.items()}


def _file() -> Path:
    return Path(settings.DATA_DIR) / "run" / "disk.json"


def _sizes(folder: Path) -> Iterator[int]:
    """Yield the size of each file below a folder; what vanishes meanwhile counts nothing."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _sizes(Path(entry.path))
                else:
                    yield _size(entry)
    except (FileNotFoundError, NotADirectoryError):
        return


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
