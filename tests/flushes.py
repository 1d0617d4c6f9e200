"""Notes what a piece of code flushes to the disk and renames, in order: what a power cut could take away."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Flushes:
    """The order of fsync and rename; install it with `watch`."""

    def __init__(self) -> None:
        self._flushed: set[Path] = set()
        self.renamed: list[Path] = []
        self.faults: list[str] = []

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Listen to the operating system's calls, which still happen."""
        fsync = os.fsync

        def flush(handle: Any) -> None:
            fsync(handle)
            number = handle if isinstance(handle, int) else handle.fileno()
            self._flushed.add(Path(f"/proc/self/fd/{number}").resolve())

        monkeypatch.setattr(os, "fsync", flush)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._noting(getattr(os, name)))

    def assert_safe(self, target: Path) -> None:
        """Fail unless the target appeared whole: all of it flushed, then renamed, then its folder flushed."""
        assert self.renamed == [target.resolve()], self.renamed
        assert not self.faults, self.faults
        assert target.resolve().parent in self._flushed, "the new name could be lost"

    def _noting(self, rename: Callable[..., None]) -> Callable[..., None]:
        def note(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
            path = Path(source).resolve()
            parts = [path, *path.rglob("*")] if path.is_dir() else [path]
            self.faults += [
                f"{part} was renamed before it was flushed" for part in parts if part not in self._flushed
            ]
            rename(source, target, *args, **kwargs)
            self.renamed.append(Path(target).resolve())
            self._flushed.discard(Path(target).resolve().parent)

        return note
