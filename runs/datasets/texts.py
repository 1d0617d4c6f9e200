"""Reads plain text: each paragraph, ended by a blank line, is one row.

A paragraph of more than 16,384 characters is cut at the line end before that, or inside a line that is
longer than that on its own, so a book without blank lines becomes rows of that length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from runs.datasets import lines
from runs.datasets.encodings import not_utf8
from runs.datasets.problems import Problem
from runs.datasets.sources import Source

MAX_CHARS: Final = 16_384


def read_text(source: Source) -> Iterator[tuple[int, object]]:
    """Yield {"text": paragraph} with the line it starts on."""
    start, num_chars, parts = 0, 0, list[str]()
    for number, raw in lines.numbered_lines(source):
        line = _decoded(raw, number)
        if isinstance(line, Problem):
            yield number, line
            continue
        if parts and (not line or num_chars + len(line) > MAX_CHARS):
            yield start, {"text": "\n".join(parts)}
            parts, num_chars = [], 0
        if line:
            start = start if parts else number
            for position in range(0, len(line) - MAX_CHARS, MAX_CHARS):
                yield number, {"text": line[position : position + MAX_CHARS]}
            parts.append(line[(len(line) - 1) // MAX_CHARS * MAX_CHARS :])
            num_chars += len(parts[-1]) + 1
    if parts:
        yield start, {"text": "\n".join(parts)}


def _decoded(raw: bytes | Problem, number: int) -> str | Problem:
    """Return a line without spaces at its end, or what is wrong with it."""
    if isinstance(raw, Problem):
        return raw
    try:
        return raw.decode().rstrip()
    except UnicodeDecodeError as error:
        return not_utf8(raw, error, number)
