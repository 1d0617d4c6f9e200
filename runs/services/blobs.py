"""Large payloads outside the rows: content-addressed, on disk before the row that names them."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from django.core.files.base import ContentFile, File
from django.core.files.storage import FileSystemStorage, default_storage, storages

from runs.exceptions import DiskFull
from runs.services import storage_mark

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

PAYLOADS: Final = "payloads"
# Payloads are deleted only when nobody stored the same bytes for so long: the row that names them comes later.
GRACE_S: Final = 3600.0
# A turn of cleaning up begins nothing more after so long, which is what one file takes of a bucket that does not answer.
CLEANUP_S: Final = 20.0
_READ_AGAIN_S: Final = (0.05, 0.5)
_SPARE_BYTES: Final = 64 << 20
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def put(digest: str, data: bytes) -> str:
    """Store the bytes durably under their SHA-256 and return the name to read them back by.

    Raises:
        DiskFull: there is no room; nothing was stored.
        OSError: the disk or the bucket fails.
    """
    name = f"{PAYLOADS}/{digest[:2]}/{digest}"
    if isinstance(storages["default"], FileSystemStorage):
        path = Path(default_storage.path(name))
        if not _touch(path):
            storage_mark.check()
            with room():
                _write_durably(path, data)
        return name
    with away():
        if _age_s(name) > GRACE_S / 2:
            default_storage.save(name, ContentFile(data))
    return name


def delete_if_old(name: str) -> bool:
    """Delete a payload that no row names, unless somebody stored the same bytes a short while ago.

    False, with the reason logged, too when the storage refuses.
    """
    try:
        with away():
            return _delete_if_old(name)
    except OSError as error:
        logger.warning("the file %s could not be deleted: %s", name, error)
        return False


def payload_names(prefix: str) -> Iterator[str]:
    """Yield the names of the payloads whose digest begins with these two digits."""
    folder = f"{PAYLOADS}/{prefix}"
    try:
        _, names = default_storage.listdir(folder)
    except FileNotFoundError:
        return
    yield from (f"{folder}/{name}" for name in names)


def get(name: str) -> bytes:
    """Return the bytes stored under a name.

    Raises:
        FileNotFoundError: there are none.
        OSError: the disk or the bucket fails.
    """
    return patiently(partial(_read, name))


def patiently(read: Callable[[], Result]) -> Result:
    """Read from storage, and again after a moment when the disk fails at it: nothing is given up for one bad read.

    Raises:
        FileNotFoundError: what is read is gone.
        OSError: the disk or the bucket fails, or is not the one that was used before.
    """
    for pause_s in _READ_AGAIN_S:
        try:
            return _read_here(read)
        except FileNotFoundError:
            raise
        except OSError as error:
            logger.warning("a file could not be read, trying again: %s", error)
            time.sleep(pause_s)
    return _read_here(read)


def _read_here(read: Callable[[], Result]) -> Result:
    try:
        return read()
    except FileNotFoundError:
        with away():
            storage_mark.check()
        raise


def move_in(path: Path, name: str) -> None:
    """Move a local file into storage under a name, durably."""
    if not isinstance(storages["default"], FileSystemStorage):
        with path.open("rb") as file:
            default_storage.save(name, File(file))
        path.unlink()
        return
    storage_mark.check()
    target = Path(default_storage.path(name))
    target.parent.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    shutil.move(path, target)
    _flush_folder(target.parent)


def link_in(path: Path, name: str) -> None:
    """Store a local file under a name, durably, and leave it where it is; copied only where it must be."""
    if not isinstance(storages["default"], FileSystemStorage):
        with path.open("rb") as file:
            default_storage.save(name, File(file))
        return
    storage_mark.check()
    target = Path(default_storage.path(name))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(path, target)
    os.utime(target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    _flush_folder(target.parent)


def delete_folder(directory: str) -> bool:
    """Remove a storage folder with all that is in it; false, with the reason logged, when the storage refuses.

    One that is gone already counts as removed, unless the storage is another one than before.
    """
    try:
        with away():
            if not _remove(directory):
                storage_mark.check()
    except OSError as error:
        logger.warning("the folder %s could not be deleted: %s", directory, error)
        return False
    return True


def has_room(name: str, size_bytes: int) -> bool:
    """Return whether a file of this size has room where a name of storage lies, with something to spare."""
    if not isinstance(storages["default"], FileSystemStorage):
        return True
    path = Path(default_storage.path(name))
    folder = next(parent for parent in path.parents if parent.exists())
    return shutil.disk_usage(folder).free > size_bytes + _SPARE_BYTES


@contextlib.contextmanager
def room() -> Iterator[None]:
    """Tell a full disk, a used-up quota or a file longer than this process may write as what they are."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFull from error
        raise


@contextlib.contextmanager
def away() -> Iterator[None]:
    """Tell a failing bucket as a failing disk is told: each client of one has errors of its own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error)) from error


def _remove(directory: str) -> bool:
    """Remove a folder; false if nothing of it is there."""
    if isinstance(storages["default"], FileSystemStorage):
        return _remove_here(Path(default_storage.path(directory)))
    try:
        folders, names = default_storage.listdir(directory)
    except FileNotFoundError:
        return False
    for name in names:
        default_storage.delete(f"{directory}/{name}")
    return any([bool(names), *(_remove(f"{directory}/{folder}") for folder in folders)])


def _remove_here(path: Path) -> bool:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        if path.exists():  # somebody else removes it at the same time, and may not get to its end
            raise
        return False
    return True


def _delete_if_old(name: str) -> bool:
    if not isinstance(storages["default"], FileSystemStorage):
        is_old = GRACE_S < _age_s(name) < float("inf")
        if is_old:
            default_storage.delete(name)
        return is_old
    path = Path(default_storage.path(name))
    aside = path.with_name(f".old-{path.name}")
    try:
        if _file_age_s(path) < GRACE_S:
            return False
        # Whoever stores it again either touches it before it is moved, which is seen here, or writes it anew.
        os.rename(path, aside)
        if _file_age_s(aside) < GRACE_S:
            os.replace(aside, path)
            return False
        aside.unlink()
    except FileNotFoundError:
        return False
    return True


def _write_durably(path: Path, data: bytes) -> None:
    """Write, fsync, rename, fsync the folder: after a power cut the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)
    _flush_folder(path.parent)


def _read(name: str) -> bytes:
    with away(), default_storage.open(name) as file:
        data: bytes = file.read()
    return data


def _touch(path: Path) -> bool:
    """Mark the file as stored just now; false if there is none."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _file_age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _age_s(name: str) -> float:
    """Return how long ago a name of a remote storage was written; infinity if it does not exist."""
    if not default_storage.exists(name):
        return float("inf")
    return time.time() - default_storage.get_modified_time(name).timestamp()


def _flush_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
