"""Whether the storage is the one that earlier files went to.

A disk that is not mounted looks like one that lost everything. What is gone fails for good, so nothing is taken for
that, and nothing is written, where the mark is missing that every storage gets before its first file.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

from django.core.files.base import ContentFile
from django.core.files.storage import FileSystemStorage, default_storage, storages

from runs.models import Checkpoint, Snapshot

NAME: Final = "mintweb-storage.txt"
AWAY: Final = f"the storage lacks the file {NAME}, so it is another one than before; is its disk mounted?"
_TEXT: Final = (
    b"mintweb keeps its files here. Where this file is missing it waits for the disk to be mounted.\n"
)
# Earlier versions made no mark: so many states of each kind are looked for.
_NUM_LOOKED_FOR: Final = 5


def check() -> None:
    """Pass if the storage has its mark; one of first use gets it.

    Raises:
        OSError: it is another one than before, or fails; a bucket's client has errors of its own.
    """
    if default_storage.exists(NAME):
        return
    if not _is_used_first() and not _has_states():
        raise OSError(errno.ENODEV, AWAY)
    if isinstance(storages["default"], FileSystemStorage):
        path = Path(default_storage.path(NAME))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_TEXT)
    else:
        default_storage.save(NAME, ContentFile(_TEXT))


def _is_used_first() -> bool:
    return not Snapshot.objects.exists() and not Checkpoint.objects.filter(size_bytes__gt=0).exists()


def _has_states() -> bool:
    """Return whether any of the newest states lies there."""
    newest = [
        *Snapshot.objects.order_by("-pk").values_list("directory", flat=True)[:_NUM_LOOKED_FOR],
        *Checkpoint.objects.filter(size_bytes__gt=0)
        .order_by("-pk")
        .values_list("directory", flat=True)[:_NUM_LOOKED_FOR],
    ]
    return any(_has_files(directory) for directory in newest)


def _has_files(directory: str) -> bool:
    try:
        return bool(default_storage.listdir(directory)[1])
    except FileNotFoundError:
        return False
