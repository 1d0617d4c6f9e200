"""What the name of a file says about how its rows are written. Light: the web process asks it, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Final

_ENDS: Final[Mapping[str, tuple[str, ...]]] = {
    "json": (".jsonl", ".json", ".ndjson"),
    "table": (".csv", ".tsv", ".tab"),
    "text": (".txt", ".text", ".md", ".rst"),
}


def types_in(filename: str) -> frozenset[str]:
    """Return which of json, table and text a name speaks of; none where its content alone decides.

    Two ends are looked at, since the last may be that of a compression.
    """
    suffixes = PurePath(filename.lower()).suffixes[-2:]
    return frozenset(name for name, ends in _ENDS.items() if any(one in ends for one in suffixes))
