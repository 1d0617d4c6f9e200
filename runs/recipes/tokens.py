"""Token stores: a dataset version as tokens and masks for one base model, made once and kept in a cache.

A store is named by everything its content depends on. It is written beside its place and renamed into it,
so that a store is whole or absent; a lock on a file lets only one process write it, and ends with the process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from django.conf import settings

from runs.exceptions import RequestInvalid
from runs.models import DatasetVersion
from runs.recipes.rendering import Renderer, Row, TrainOn, renderer_of
from runs.recipes.token_files import (
    DESCRIPTION,
    FORMAT,
    Counts,
    Problem,
    StoreWriter,
    TokenStore,
    flush_folder,
)
from runs.services import dataset_rows

__all__ = ["Counts", "Problem", "TokenStore", "open_store", "prepare", "remove_unused", "write"]

Progress = Callable[[float], None]
# Rows go to the tokenizer together for speed, few enough that memory stays flat: a token takes about 100 bytes there.
_ROWS_READ: Final = 64
_CHUNK_ROWS: Final = 512
_CHUNK_CHARS: Final = 1_000_000
_WAIT_S: Final = 0.2
_DRAFT, _GONE = ".draft", ".gone"


class Rows(Protocol):
    """Rows on disk, as `services.dataset_rows.open_rows` gives them."""

    def __len__(self) -> int: ...

    def slice(self, start: int, end: int, /) -> Iterable[Row]: ...


def prepare(
    version: DatasetVersion, base_model: str, *, train_on: TrainOn, max_length: int, progress: Progress
) -> TokenStore:
    """Return the version's tokens, made now unless they are in the cache; may take minutes.

    Whoever comes while another process makes the same store waits for it. A call that was killed leaves
    nothing that counts as a store; the next one begins anew.

    Args:
        progress: gets the share that is done, from 0 to 1; an error it raises ends the work.
    Raises:
        RequestInvalid: the base model has no usable tokenizer, or none of the rows can be rendered.
    """
    renderer = renderer_of(base_model)
    folder = _folder(key_of(version, renderer, train_on=train_on, max_length=max_length))
    return prepare_at(
        folder,
        lambda: dataset_rows.open_rows(version),
        renderer,
        train_on=train_on,
        max_length=max_length,
        progress=progress,
    )


def open_store(
    version: DatasetVersion, base_model: str, *, train_on: TrainOn, max_length: int
) -> TokenStore | None:
    """Return the version's tokens if they are in the cache.

    Raises:
        RequestInvalid: the base model has no usable tokenizer.
    """
    renderer = renderer_of(base_model)
    return _opened(_folder(key_of(version, renderer, train_on=train_on, max_length=max_length)))


def prepare_at(
    folder: Path,
    open_rows: Callable[[], AbstractContextManager[Rows]],
    renderer: Renderer,
    *,
    train_on: TrainOn,
    max_length: int,
    progress: Progress,
) -> TokenStore:
    """Return the store in a folder, made now from rows unless it is there; see `prepare`."""
    store = _opened(folder)
    if store is not None:
        return store
    with _waited_lock(folder, progress):
        store = _opened(folder)
        if store is None:
            draft = folder.with_name(folder.name + _DRAFT)
            shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed: its lock is gone
            try:
                with open_rows() as rows:
                    write(draft, rows, renderer, train_on=train_on, max_length=max_length, progress=progress)
                draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
            flush_folder(folder.parent)
            store = TokenStore(folder)
    return store


def write(
    folder: Path, rows: Rows, renderer: Renderer, *, train_on: TrainOn, max_length: int, progress: Progress
) -> None:
    """Write the rows' tokens as a store into a new folder, with flat memory.

    Raises:
        RequestInvalid: none of the rows can be rendered.
    """
    with StoreWriter(folder) as writer:
        for chunk in _chunks(rows):
            rendered = renderer.rows(chunk, train_on=train_on, max_length=max_length)
            writer.add(rendered, [_digest_of(row) for row in chunk])
            progress(writer.counts.num_rows / len(rows))
        counts = writer.counts
        if counts.num_rows and counts.num_failed_rows == counts.num_rows:
            problem = writer.problems[0]
            raise RequestInvalid(
                f"none of the {counts.num_rows} rows can be rendered; row {problem.row + 1}: {problem.reason}",
                place="dataset",
            )
        writer.finish()


def remove_unused(limit_bytes: int | None = None) -> int:
    """Delete the stores that were opened longest ago until the rest fits the limit, and what killed processes left.

    A process that reads a deleted store goes on reading it; its place on the disk is free when it is done.

    Args:
        limit_bytes: None for the setting MINTWEB_CACHE_BYTES.
    Returns:
        the bytes deleted.
    """
    limit = settings.CACHE_BYTES if limit_bytes is None else limit_bytes
    sizes: dict[Path, int] = {}
    used_at: dict[Path, float] = {}
    freed = 0
    for folder in _folders():
        size, used = _size_and_use(folder)
        if used is None:
            freed += size if _delete(folder) else 0
        else:
            sizes[folder], used_at[folder] = size, used
    excess = sum(sizes.values()) - limit
    for folder in sorted(sizes, key=used_at.__getitem__):
        if excess <= 0:
            break
        if _delete(folder):
            excess -= sizes[folder]
            freed += sizes[folder]
    return freed


def _cache() -> Path:
    return Path(settings.DATA_DIR) / "cache" / "tokens"


def _folder(key: str) -> Path:
    return _cache() / key


def key_of(version: DatasetVersion, renderer: Renderer, *, train_on: TrainOn, max_length: int) -> str:
    """Return a name that two stores share only if their content is the same."""
    parts = [
        FORMAT,
        version.digest,
        version.kind,
        version.mapping,
        version.encoding,
        version.skip_bad_rows,
        version.num_rows,
        str(version.checked_at),  # a file that is read once more may be read otherwise, as under another name
        renderer.digest,
        train_on,
        max_length,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _opened(folder: Path) -> TokenStore | None:
    try:
        store = TokenStore(folder)
        os.utime(folder / DESCRIPTION)
    except FileNotFoundError:  # never made, or deleted just now
        return None
    return store


def _chunks(rows: Rows) -> Iterator[list[Row]]:
    """Yield the rows in groups of about as many characters as the tokenizer should hold at once."""
    chunk: list[Row] = []
    num_chars = 0
    for start in range(0, len(rows), _ROWS_READ):
        for row in rows.slice(start, min(start + _ROWS_READ, len(rows))):
            chunk.append(row)
            num_chars += _num_chars(row)
            if len(chunk) >= _CHUNK_ROWS or num_chars >= _CHUNK_CHARS:
                yield chunk
                chunk, num_chars = [], 0
    if chunk:
        yield chunk


def _digest_of(row: Row) -> int:
    text = json.dumps(dict(row), sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _num_chars(row: Row) -> int:
    messages: Any = row.get("messages") or ()
    return sum(len(str(message.get("content", ""))) for message in messages) + sum(
        len(value) for value in row.values() if isinstance(value, str)
    )


# -- one writer at a time -------------------------------------------------------------------------------------


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the lock on a store's name, if nobody else does; yield whether it is held.

    Stores share 256 lock files, which are never deleted: deleting one would let two processes hold it.
    """
    locks = folder.parent / "locks"
    locks.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (locks / folder.name[:2]).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def _waited_lock(folder: Path, progress: Progress) -> Iterator[None]:
    while True:
        with _lock(folder) as is_held:
            if is_held:
                yield
                return
        progress(0.0)
        time.sleep(_WAIT_S)


def _folders() -> list[Path]:
    cache = _cache()
    if not cache.is_dir():
        return []
    return [folder for folder in cache.iterdir() if folder.name != "locks"]


def _size_and_use(folder: Path) -> tuple[int, float | None]:
    """Return a folder's bytes, and when it was last opened if it holds a whole store."""
    try:
        size = sum(file.stat().st_size for file in folder.iterdir())
        is_store = not folder.suffix
        return size, (folder / DESCRIPTION).stat().st_mtime if is_store else None
    except FileNotFoundError:  # it was renamed or deleted just now
        return 0, None


def _delete(folder: Path) -> bool:
    """Delete a store or what is left of one, unless a process is writing it."""
    with _lock(folder) as is_held:
        if not is_held or not folder.exists():
            return False
        gone = folder.with_name(folder.name.partition(".")[0] + _GONE)
        shutil.rmtree(gone, ignore_errors=True)
        if folder != gone:
            folder.rename(gone)  # at once, so that nobody opens half a store
            shutil.rmtree(gone)
    return True
