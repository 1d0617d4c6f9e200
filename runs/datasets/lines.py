"""Splits a stream of blocks into numbered lines with flat memory, whatever the length of a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from runs.datasets.problems import Problem, excerpt_of
from runs.datasets.sources import Source

MAX_LINE_BYTES: Final = 16 * 2**20


def line_end(head: bytes) -> bytes:
    r"""Return what ends a line: "\r" for a file that has no "\n" (old Mac), else "\n"."""
    return b"\r" if b"\r" in head and b"\n" not in head else b"\n"


def numbered_lines(source: Source) -> Iterator[tuple[int, bytes | Problem]]:
    r"""Yield each line without its end ("\r" of "\r\n" stays), or the problem of one that is too long.

    The part after the last line end comes last, unless it is empty.
    """
    end = line_end(source.head)
    number = 0
    long_line = _LongLine()
    for block in source.blocks():
        first, *parts = block.split(end)
        long_line.add(first)
        if not parts:
            continue
        number += 1
        yield number, long_line.take(number)
        rest = parts.pop()
        for part in parts:
            number += 1
            yield number, part
        long_line.add(rest)
    if long_line.size_bytes:
        yield number + 1, long_line.take(number + 1)


class _LongLine:
    """A line that arrives in several blocks; what exceeds the limit is counted and thrown away."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._parts: list[bytes] = []

    def add(self, part: bytes) -> None:
        self.size_bytes += len(part)
        if self.size_bytes <= MAX_LINE_BYTES:
            self._parts.append(part)
        elif len(self._parts) > 1:
            del self._parts[1:]

    def take(self, number: int) -> bytes | Problem:
        raw = b"".join(self._parts)
        size_bytes = self.size_bytes
        self.size_bytes = 0
        self._parts = []
        return raw if size_bytes <= MAX_LINE_BYTES else too_long(number, size_bytes, raw)


def too_long(number: int, size_bytes: int, raw: bytes) -> Problem:
    """Return the problem of a line over the limit."""
    return Problem(
        code="line_too_long",
        reason=f"the line has {size_bytes / 2**20:.1f} MiB, and the limit is {MAX_LINE_BYTES // 2**20} MiB",
        fix="put one row on each line, and cut very long texts",
        line=number,
        column=1,
        excerpt=excerpt_of(raw[:1000].decode("utf-8", "replace"), 0),
    )
