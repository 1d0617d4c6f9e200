"""Counts every call that a process makes to PostgreSQL, the storage folder and Redis, and breaks the n-th.

Nothing of the product knows of it: the calls are met where they leave the libraries (psycopg's cursors and
connections, Python's audit events and fsync, safetensors' reads and writes, Redis' connections).
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import psycopg
import redis.asyncio.connection
import redis.connection
import redis.exceptions
import safetensors.torch

Library = Literal["db", "file", "redis"]
# once: the call is not made; lost: it is made, but its answer is lost; forever: it and all later ones are not made.
MODES: Final[dict[str, tuple[str, ...]]] = {
    "db": ("once", "lost", "forever"),
    "file": ("once", "forever"),
    "redis": ("once", "forever"),
}
KINDS: Final = tuple(f"{role}-{library}" for role in ("worker", "web") for library in MODES)
_ROOT: Final = Path(__file__).resolve().parent.parent.parent
_OURS: Final = tuple(str(_ROOT / name) + "/" for name in ("runs", "gpuworker", "mintweb"))
# Audit event -> which of its arguments are a path and its folder's descriptor. Of shutil and tempfile there are
# events too, but no system call stands behind those.
_FILE_EVENTS: Final = {
    "open": (0, None),
    "os.mkdir": (0, 2),
    "os.rename": (0, 2),
    "os.link": (0, 2),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.chmod": (0, 2),
    "os.utime": (0, 3),
    "os.listdir": (0, None),
    "os.scandir": (0, None),
}
_TAKES_SPACE: Final = frozenset(
    {"os.mkdir", "os.rename", "os.link", "os.utime", "os.fsync", "safetensors.write"}
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The call that fails: the n-th of its kind (a role and a library) whose text or place holds all of `at`."""

    kind: str
    call: int
    mode: str
    at: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        """The process whose call it is."""
        return self.kind.partition("-")[0]

    @property
    def library(self) -> str:
        """Where the call goes to."""
        return self.kind.partition("-")[2]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call: what was asked for, and from where in the product, outermost first."""

    library: str
    number: int
    what: str
    stack: list[str]


class Calls:
    """All calls of this process, by library; `fault` says which of them fails."""

    def __init__(self, *, storage: Path, fault: Fault | None, blown: Path) -> None:
        self.made: list[Call] = []
        self._storage = str(storage)
        self._fault = fault
        self._blown = blown
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._num_met = 0
        self._is_broken = False

    def watch(self) -> None:
        """Meet every later call; there is no way back, a process is watched to its end."""
        self._watch_database()
        self._watch_files()
        self._watch_redis()

    def write(self, target: Path) -> None:
        """Keep a list of what was called."""
        target.write_text(json.dumps([vars(call) for call in self.made]))

    def _verdict(self, library: Library, what: str) -> str:
        """Count a call; returns "" to let it through, "before" or "after" to break it."""
        stack = _stack_of_ours()
        with self._lock:
            self._counts[library] += 1
            call = Call(library=library, number=self._counts[library], what=what, stack=stack)
            self.made.append(call)
            fault = self._fault
            if fault is None or fault.library != library:
                return ""
            if fault.mode == "forever" and self._is_broken:
                return "before"
            if not is_at(vars(call), fault.at):
                return ""
            self._num_met += 1
            if self._num_met != fault.call:
                return ""
            self._is_broken = True
            draft = self._blown.with_suffix(".draft")
            draft.write_text(json.dumps({**vars(call), "at": "".join(traceback.format_stack(limit=40))}))
            draft.rename(self._blown)
            return "after" if fault.mode == "lost" else "before"

    # PostgreSQL ---------------------------------------------------------------------------------

    def _watch_database(self) -> None:
        for owner, name in (
            (psycopg.Cursor, "execute"),
            (psycopg.ServerCursor, "execute"),
            (psycopg.ServerCursor, "fetchmany"),
            (psycopg.Connection, "commit"),
            (psycopg.Connection, "rollback"),
            (psycopg.Connection, "notifies"),
            (psycopg.AsyncConnection, "notifies"),
        ):
            setattr(owner, name, self._sync_query(owner.__name__, name, getattr(owner, name)))
        psycopg.AsyncCursor.execute = self._async_query(psycopg.AsyncCursor.execute)  # type: ignore[method-assign]
        psycopg.Connection.connect = classmethod(self._connecting(psycopg.Connection.connect.__func__))  # type: ignore[method-assign, assignment, attr-defined]
        psycopg.connect = psycopg.Connection.connect
        psycopg.AsyncConnection.connect = classmethod(  # type: ignore[method-assign, assignment]
            self._async_connecting(psycopg.AsyncConnection.connect.__func__)  # type: ignore[attr-defined]
        )

    def _sync_query(self, owner: str, name: str, query: Callable[..., Any]) -> Callable[..., Any]:
        def watched(target: Any, *args: Any, **kwargs: Any) -> Any:
            what = str(args[0]) if name == "execute" else f"{owner}.{name}"
            verdict = self._verdict("db", what)
            connection = getattr(target, "connection", target)
            answer = None if verdict == "before" else query(target, *args, **kwargs)
            if verdict:
                if isinstance(connection, psycopg.AsyncConnection):
                    connection.pgconn.finish()
                else:
                    connection.close()
                raise psycopg.OperationalError("the server closed the connection unexpectedly")
            return answer

        return watched

    def _async_query(self, query: Callable[..., Any]) -> Callable[..., Any]:
        async def watched(target: Any, *args: Any, **kwargs: Any) -> Any:
            verdict = self._verdict("db", str(args[0]))
            answer = None if verdict == "before" else await query(target, *args, **kwargs)
            if verdict:
                await target.connection.close()
                raise psycopg.OperationalError("the server closed the connection unexpectedly")
            return answer

        return watched

    def _connecting(self, connect: Callable[..., Any]) -> Callable[..., Any]:
        def watched(owner: Any, *args: Any, **kwargs: Any) -> Any:
            verdict = self._verdict("db", "connect")
            made = None if verdict == "before" else connect(owner, *args, **kwargs)
            if verdict:
                if made is not None:
                    made.close()
                raise psycopg.OperationalError("connection refused")
            return made

        return watched

    def _async_connecting(self, connect: Callable[..., Any]) -> Callable[..., Any]:
        async def watched(owner: Any, *args: Any, **kwargs: Any) -> Any:
            verdict = self._verdict("db", "connect")
            made = None if verdict == "before" else await connect(owner, *args, **kwargs)
            if verdict:
                if made is not None:
                    await made.close()
                raise psycopg.OperationalError("connection refused")
            return made

        return watched

    # Files --------------------------------------------------------------------------------------

    def _watch_files(self) -> None:
        sys.addaudithook(self._on_event)
        os.fsync = self._watched_fsync(os.fsync)
        for name, event in (("serialize_file", "safetensors.write"), ("safe_open", "safetensors.read")):
            function = getattr(safetensors.torch, name)
            setattr(safetensors.torch, name, self._watched_tensors(function, event))

    def _on_event(self, event: str, args: tuple[Any, ...]) -> None:
        places = _FILE_EVENTS.get(event)
        if places is not None:
            path = _path_of(args, *places)
            if path.startswith(self._storage):
                is_write = event in _TAKES_SPACE or (
                    event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
                )
                self._touch(event, path, takes_space=is_write)

    def _touch(self, event: str, path: str, *, takes_space: bool) -> None:
        what = f"{event} {path.removeprefix(self._storage)}"
        if self._verdict("file", what):
            number = errno.ENOSPC if takes_space else errno.EIO
            raise OSError(number, os.strerror(number), path)

    def _watched_fsync(self, fsync: Callable[..., None]) -> Callable[..., None]:
        def watched(handle: Any) -> None:
            number = handle if isinstance(handle, int) else handle.fileno()
            path = _path_of((number,), 0, None)
            if path.startswith(self._storage):
                self._touch("os.fsync", path, takes_space=True)
            fsync(handle)

        return watched

    def _watched_tensors(self, function: Callable[..., Any], event: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            path = str(args[0] if event == "safetensors.read" else args[1])
            if path.startswith(self._storage):
                self._touch(event, path, takes_space=event in _TAKES_SPACE)
            return function(*args, **kwargs)

        return watched

    # Redis --------------------------------------------------------------------------------------

    def _watch_redis(self) -> None:
        for name in ("connect", "send_packed_command"):
            owner: Any = redis.connection.AbstractConnection
            setattr(owner, name, self._redis_call(name, getattr(owner, name)))
            asynchronous: Any = redis.asyncio.connection.AbstractConnection
            setattr(asynchronous, name, self._async_redis_call(name, getattr(asynchronous, name)))

    def _redis_call(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(target: Any, *args: Any, **kwargs: Any) -> Any:
            if self._verdict("redis", name):
                target.disconnect()
                raise redis.exceptions.ConnectionError("connection closed by server")
            return call(target, *args, **kwargs)

        return watched

    def _async_redis_call(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        async def watched(target: Any, *args: Any, **kwargs: Any) -> Any:
            if self._verdict("redis", f"async {name}"):
                await target.disconnect()
                raise redis.exceptions.ConnectionError("connection closed by server")
            return await call(target, *args, **kwargs)

        return watched


def is_at(call: Mapping[str, Any], texts: Sequence[str]) -> bool:
    """Return whether a call's text or place holds all of these."""
    place = " ".join([call["what"], *call["stack"]])
    return all(text in place for text in texts)


def _path_of(args: tuple[Any, ...], place: int, folder_place: int | None) -> str:
    """Return the absolute path that a call names, also by descriptor or beside one."""
    path = args[place]
    if isinstance(path, int):
        return _opened(path)
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    folder = -1 if folder_place is None else args[folder_place]
    if isinstance(folder, int) and folder >= 0 and not text.startswith("/"):
        return f"{_opened(folder)}/{text}"
    return text


def _opened(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def _stack_of_ours() -> list[str]:
    """Return the product's own frames of the caller, outermost first."""
    found: list[str] = []
    frame = sys._getframe(2)
    walker: Any = frame
    while walker is not None:
        file = walker.f_code.co_filename
        if file.startswith(_OURS):
            found.append(f"{file.removeprefix(str(_ROOT) + '/')}:{walker.f_lineno} {walker.f_code.co_name}")
        walker = walker.f_back
    return found[::-1]
