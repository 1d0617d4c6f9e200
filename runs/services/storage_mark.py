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

from runs.models import Checkpoint, DatasetVersion, Snapshot

NAME: Final = "mintweb-storage.txt"
AWAY: Final = f"the storage lacks the file {NAME}, so it is another one than before; is its disk mounted?"
_TEXT: Final = (
    b"mintweb keeps its files here. Where this file is missing it waits for the disk to be mounted.\n"
)
# Earlier versions made no mark: so many folders of each kind are looked for.
_NUM_LOOKED_FOR: Final = 5


def check() -> None:
    """Pass if the storage has its mark; one of first use gets it.

    Raises:
        OSError: it is another one than before, or fails; a bucket's client has errors of its own.
    """
    if default_storage.exists(NAME):
        return
    named = _newest_folders()
    if named and not any(_has_files(directory) for directory in named):
        raise OSError(errno.ENODEV, AWAY)
    if isinstance(storages["default"], FileSystemStorage):
        path = Path(default_storage.path(NAME))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_TEXT)
    else:
        default_storage.save(NAME, ContentFile(_TEXT))


def _newest_folders() -> list[str]:
    """Return the newest folders that rows name; none where the storage is used for the first time."""
    named = (
        Snapshot.objects.all(),
        Checkpoint.objects.filter(size_bytes__gt=0),
        DatasetVersion.objects.filter(state=DatasetVersion.State.READY),
    )
    return [
        directory
        for rows in named
        for directory in rows.order_by("-pk").values_list("directory", flat=True)[:_NUM_LOOKED_FOR]
    ]


def _has_files(directory: str) -> bool:
    try:
        return bool(default_storage.listdir(directory)[1])
    except FileNotFoundError:
        return False
