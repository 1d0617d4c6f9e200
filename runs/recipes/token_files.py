"""A dataset version's tokens on disk: written in one pass, read by memory map.

A store is a folder of five little-endian arrays and a description:

    tokens.bin     uint32, all rows end to end; the highest bit says that the token is trained on
    offsets.bin    int64, where each row begins, and the end of the last
    trained.bin    int32, trained tokens of each row
    truncated.bin  int32, tokens cut off each row
    digests.bin    uint64, equal for equal rows, whatever model they are for and wherever they are cut
    store.json     format, counts, the first problems
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from runs.recipes.rendering import TokenRow

FORMAT: Final = 2
MAX_PROBLEMS: Final = 100
DESCRIPTION: Final = "store.json"
_TRAINED_BIT: Final = np.uint32(1 << 31)
_ARRAYS: Final = {"tokens": "<u4", "offsets": "<i8", "trained": "<i4", "truncated": "<i4", "digests": "<u8"}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A row that cannot be rendered; `row` counts from 0."""

    row: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What is in a store. Failed rows are untrained rows too."""

    num_rows: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_truncated_rows: int = 0
    num_untrained_rows: int = 0
    num_failed_rows: int = 0


class TokenStore:
    """Rows as tokens, read from disk as they are asked for. Stays readable after its folder is deleted.

    Raises:
        FileNotFoundError: there is no whole store in the folder.
    """

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self.counts = Counts(**about["counts"])
        self.problems = tuple(Problem(**problem) for problem in about["problems"])
        self._tokens = _mapped(folder, "tokens")
        self._offsets = _mapped(folder, "offsets")
        self._truncated = _mapped(folder, "truncated")
        self.num_trained: npt.NDArray[np.int32] = np.array(_mapped(folder, "trained"), dtype=np.int32)
        self.digests: npt.NDArray[np.uint64] = _mapped(folder, "digests")
        self.lengths: npt.NDArray[np.int32] = np.diff(self._offsets).astype(np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> TokenRow:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start, end = self._offsets[row : row + 2]
        packed = np.asarray(self._tokens[start:end])
        return TokenRow(
            tokens=(packed & ~_TRAINED_BIT).astype(np.int32),
            mask=packed >= _TRAINED_BIT,
            num_truncated=int(self._truncated[row]),
        )


class StoreWriter:
    """Writes a store into a new folder; what it holds in memory does not grow with the rows."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True)
        self._folder = folder
        self._files: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in _ARRAYS}
        self._counts = Counts()
        self._problems: list[Problem] = []
        self._write("offsets", [0])

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as files:  # on a full disk closing one fails; the others are closed all the same
            for file in self._files.values():
                files.enter_context(file)

    @property
    def counts(self) -> Counts:
        """What was written so far."""
        return self._counts

    @property
    def problems(self) -> Sequence[Problem]:
        """The first rows that could not be rendered."""
        return self._problems

    def add(self, rows: Sequence[TokenRow | Exception], digests: Sequence[int]) -> None:
        """Append rows with a digest of what each was made from; an error takes its row's place as a row without tokens."""
        good = [_EMPTY if isinstance(row, Exception) else row for row in rows]
        failed = [(place, row) for place, row in enumerate(rows) if isinstance(row, Exception)]
        ends = self._counts.num_tokens + np.cumsum([len(row.tokens) for row in good])
        trained = np.array([np.count_nonzero(row.mask) for row in good], dtype=np.int64)
        truncated = [row.num_truncated for row in good]
        for row in good:
            self._write("tokens", row.tokens.astype("<u4") | (row.mask * _TRAINED_BIT))
        self._write("offsets", ends)
        self._write("trained", trained)
        self._write("truncated", truncated)
        self._write("digests", np.array(digests, dtype=np.uint64))
        for place, error in failed[: MAX_PROBLEMS - len(self._problems)]:
            self._problems.append(Problem(row=self._counts.num_rows + place, reason=str(error)))
        self._counts = Counts(
            num_rows=self._counts.num_rows + len(rows),
            num_tokens=int(ends[-1]),
            num_trained_tokens=self._counts.num_trained_tokens + int(trained.sum()),
            num_truncated_rows=self._counts.num_truncated_rows + int(np.count_nonzero(truncated)),
            num_untrained_rows=self._counts.num_untrained_rows + int((trained == 0).sum()),
            num_failed_rows=self._counts.num_failed_rows + len(failed),
        )

    def finish(self) -> None:
        """Write the description, and everything through to the disk."""
        about = {
            "format": FORMAT,
            "counts": asdict(self._counts),
            "problems": [asdict(problem) for problem in self._problems],
        }
        for file in self._files.values():
            _flush(file)
        with (self._folder / DESCRIPTION).open("wb") as file:
            file.write(json.dumps(about).encode())
            _flush(file)
        flush_folder(self._folder)

    def _write(self, name: str, values: npt.ArrayLike) -> None:
        self._files[name].write(np.asarray(values).astype(_ARRAYS[name]).tobytes())


def flush_folder(folder: Path) -> None:
    """Write a folder's names through to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _mapped(folder: Path, name: str) -> npt.NDArray[Any]:
    file = folder / f"{name}.bin"
    if file.stat().st_size == 0:  # nothing cannot be mapped
        return np.zeros(0, dtype=_ARRAYS[name])
    return np.memmap(file, dtype=_ARRAYS[name], mode="r")


_EMPTY: Final = TokenRow(
    tokens=np.zeros(0, dtype=np.int32), mask=np.zeros(0, dtype=np.bool_), num_truncated=0
)
