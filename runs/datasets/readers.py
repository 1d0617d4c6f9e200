"""Finds out how the rows of a file are written, and reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

from runs.datasets import json_readers, parquet, tables, texts
from runs.datasets.file_names import types_in
from runs.datasets.formats import KNOWN_COLUMNS
from runs.datasets.sources import Source

Reader = Callable[[Source], Iterator[tuple[int, object]]]
READERS: Final[dict[str, Reader]] = {
    "jsonl": json_readers.read_jsonl,
    "json": json_readers.read_json,
    "csv": tables.read_table,
    "text": texts.read_text,
    "parquet": parquet.read_parquet,
}
# An object or array whose first line holds no more than its beginning.
_PRETTY: Final = re.compile(rb'\s*[{\[]\s*\n\s*["{\[}]|\s*\[\s*[{"\[]')


def container_of(source: Source, filename: str) -> str:
    """Return how the rows are written: jsonl, json, csv, text or parquet.

    The content decides; the name only where both plain text and a table are possible.
    """
    if source.is_parquet:
        return "parquet"
    types = types_in(filename)
    start = source.head.lstrip()
    if start.startswith((b"{", b"[")) and not types & {"table", "text"}:
        return "json" if _PRETTY.match(source.head) and not _is_array_a_line(start) else "jsonl"
    if "json" in types:
        return "jsonl"
    if "table" in types:
        return "csv"
    if "text" in types:
        return "text"
    return "csv" if _names_known_columns(source.head) else "text"


def _is_array_a_line(start: bytes) -> bool:
    """Return whether several whole arrays follow each other, one on each line."""
    first, _, second = start.partition(b"\n")
    return first.rstrip().endswith(b"]") and second.lstrip().startswith(b"[")


def _names_known_columns(head: bytes) -> bool:
    delimiter = tables.find_delimiter(head)
    if not delimiter:
        return False
    first = head.split(b"\n", 1)[0].decode("utf-8", "replace")
    names = {name.strip().strip('"').lower() for name in first.split(delimiter)}
    return len(names & KNOWN_COLUMNS) >= 2
