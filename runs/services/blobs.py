"""Large payloads outside the rows: content-addressed, on disk before the row that names them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from django.core.files.base import ContentFile, File
from django.core.files.storage import FileSystemStorage, default_storage, storages


def put(digest: str, data: bytes) -> str:
    """Store the bytes durably under their SHA-256 and return the name to read them back by."""
    name = f"payloads/{digest[:2]}/{digest}"
    if isinstance(storages["default"], FileSystemStorage):
        _write_durably(Path(default_storage.path(name)), data)
    elif not default_storage.exists(name):
        default_storage.save(name, ContentFile(data))
    return name


def get(name: str) -> bytes:
    """Return the bytes stored under a name."""
    with default_storage.open(name) as file:
        data: bytes = file.read()
    return data


def move_in(path: Path, name: str) -> None:
    """Move a local file into storage under a name, durably."""
    if not isinstance(storages["default"], FileSystemStorage):
        with path.open("rb") as file:
            default_storage.save(name, File(file))
        path.unlink()
        return
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


def delete_folder(directory: str) -> None:
    """Remove a storage folder with its files."""
    if isinstance(storages["default"], FileSystemStorage):
        shutil.rmtree(default_storage.path(directory), ignore_errors=True)
        return
    _, names = default_storage.listdir(directory)
    for name in names:
        default_storage.delete(f"{directory}/{name}")


def _write_durably(path: Path, data: bytes) -> None:
    """Write, fsync, rename, fsync the folder: after a power cut the file is whole or absent."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", delete=False) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
    _flush_folder(path.parent)


def _flush_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
