"""Figures of the good rows, gathered in flat memory while they stream: lengths, roles, duplicates."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import orjson

from runs.datasets.report import Bin, Lengths

_MAX_HASHES: Final = 2**22
_POSITIVE: Final = 2**64 - 1


def bin_of(length: int) -> int:
    """Return the number of the bin: two to each power of two, such as 8-11 and 12-15."""
    bits = length.bit_length()
    return length if bits < 2 else 2 * bits - 2 + (length >> (bits - 2) & 1)


def bin_range(number: int) -> tuple[int, int]:
    """Return the smallest and the largest length of a bin."""
    if number < 2:
        return number, number
    half = 1 << (number // 2 - 1)
    low = (2 + number % 2) * half
    return low, low + half - 1


def text_of_row(row: dict[str, Any]) -> str:
    """Return all the text of a canonical row, as it is measured."""
    parts = [message["content"] for message in row.get("messages", ())]
    calls = [message["tool_calls"] for message in row.get("messages", ()) if "tool_calls" in message]
    parts += [orjson.dumps(call).decode() for call in calls]
    parts += [value for value in row.values() if isinstance(value, str)]
    return "\n".join(parts)


class Statistics:
    """Counts the rows it is given."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.is_ascii = True
        self.roles: Counter[str] = Counter()
        self._bins = [0] * 64
        self._total = 0
        self._max = 0
        self._seen = _Seen()

    def add(self, row: dict[str, Any], raw: bytes) -> None:
        """Count a canonical row; `raw` is the same as bytes."""
        num_chars = 0
        for name, value in row.items():
            if name == "messages":
                for message in value:
                    num_chars += len(message["content"])
                    self.roles[message["role"]] += 1
            elif value.__class__ is str:
                num_chars += len(value)
        self.num_rows += 1
        self.is_ascii = self.is_ascii and raw.isascii()
        self._total += num_chars
        self._max = max(self._max, num_chars)
        self._bins[bin_of(num_chars)] += 1
        self._seen.add(raw)

    def characters(self) -> Lengths | None:
        """Return the lengths in characters, None if there was no row."""
        if not self.num_rows:
            return None
        return Lengths(
            num_rows=self.num_rows,
            is_estimate=False,
            total=self._total,
            p50=min(self._percentile(0.5), self._max),
            p95=min(self._percentile(0.95), self._max),
            max=self._max,
            histogram=_histogram(self._bins),
        )

    def duplicates(self) -> tuple[int, bool]:
        """Return how many rows were seen before, and whether that is an estimate."""
        return self._seen.num_duplicates()

    def _percentile(self, share: float) -> int:
        left = share * self.num_rows
        for number, count in enumerate(self._bins):
            left -= count
            if left <= 0:
                return bin_range(number)[1]
        return self._max


def lengths_of_sample(lengths: Sequence[int], *, num_rows: int) -> Lengths:
    """Return the figures of a sample out of `num_rows` rows."""
    values = np.asarray(lengths)
    bins = [0] * 130
    for length in lengths:
        bins[bin_of(length)] += 1
    p50, p95 = np.percentile(values, [50, 95], method="higher")
    return Lengths(
        num_rows=len(lengths),
        is_estimate=len(lengths) < num_rows,
        total=round(float(values.mean()) * num_rows),
        p50=int(p50),
        p95=int(p95),
        max=int(values.max()),
        histogram=_histogram(bins),
    )


def _histogram(bins: Sequence[int]) -> list[Bin]:
    """Return the bins from the first to the last that is not empty."""
    used = [number for number, count in enumerate(bins) if count]
    return [
        Bin(low=bin_range(number)[0], high=bin_range(number)[1], count=bins[number])
        for number in range(used[0], used[-1] + 1)
    ]


class _Seen:
    """Finds duplicates by a 64-bit hash of the canonical row, 8 bytes a row and 32 MiB at most.

    When that is full, only hashes that end in one more zero bit are kept and counted for.
    """

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._mask = 0

    def add(self, raw: bytes) -> None:
        digest = hash(raw) & _POSITIVE
        if not digest & self._mask:
            self._hashes.append(digest)
            if len(self._hashes) >= _MAX_HASHES:
                self._thin_out()

    def num_duplicates(self) -> tuple[int, bool]:
        hashes = np.frombuffer(self._hashes, dtype=np.uint64) if self._hashes else np.empty(0, np.uint64)
        return (len(hashes) - len(np.unique(hashes))) * (self._mask + 1), self._mask > 0

    def _thin_out(self) -> None:
        self._mask = self._mask * 2 + 1
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        self._hashes = array("Q", hashes[(hashes & np.uint64(self._mask)) == 0].tobytes())
