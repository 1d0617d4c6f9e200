"""Writes canonical rows with the place of each, under other names until they are complete."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

NAMES: Final = ("rows.jsonl", "rows.idx")
_BUFFER_BYTES: Final = 2**20
_NUM_OFFSETS: Final = 65_536


class RowWriter:
    """Appends rows; `keep` gives the files their names, `drop` deletes them."""

    def __init__(self, folder: Path) -> None:
        self.num_rows = 0
        self._paths = [folder / f"{name}.part" for name in NAMES]
        self._rows = self._paths[0].open("wb", buffering=_BUFFER_BYTES)
        self._index = self._paths[1].open("wb")
        self._offsets = array("Q", [0])
        self._end = 0

    def add(self, raw: bytes) -> None:
        """Append a row, given as JSON without a line end."""
        self._rows.write(raw)
        self._rows.write(b"\n")
        self._end += len(raw) + 1
        self.num_rows += 1
        self._offsets.append(self._end)
        if len(self._offsets) >= _NUM_OFFSETS:
            self._flush_index()

    def finish(self) -> None:
        """Write everything out and close the files."""
        self._flush_index()
        for file in (self._rows, self._index):
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def keep(self) -> None:
        """Give the finished files their names."""
        for path in self._paths:
            path.replace(path.with_suffix(""))

    def drop(self) -> None:
        """Delete the finished files."""
        for path in self._paths:
            path.unlink()

    def read(self, numbers: list[int]) -> Iterator[dict[str, Any]]:
        """Yield some of the finished rows."""
        offsets = np.memmap(self._paths[1], dtype="<u8", mode="r")
        with self._paths[0].open("rb") as file:
            for number in numbers:
                start, end = int(offsets[number]), int(offsets[number + 1])
                file.seek(start)
                yield orjson.loads(file.read(end - start))

    def size_bytes(self) -> int:
        """Return the size of all rows."""
        return self._end

    def _flush_index(self) -> None:
        np.asarray(self._offsets, dtype="<u8").tofile(self._index)
        del self._offsets[:]
