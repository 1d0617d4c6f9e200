"""What the doctor says about a file, as it is stored with a dataset version and shown on its page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Final

from runs.datasets.problems import Problem


class Outcome(StrEnum):
    """What happens next: `needs_mapping` and `needs_choice` wait for a person."""

    READY = "ready"
    NEEDS_MAPPING = "needs_mapping"
    NEEDS_CHOICE = "needs_choice"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Bin:
    """How many rows have a length of `low` to `high`, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of rows; `num_rows` says how many were measured. Percentiles are of those rows.

    For characters every row is measured (the percentiles are then the upper end of a bin); for tokens
    a seeded sample is, without the chat template's own tokens, and `total` is scaled up to the whole file.
    """

    num_rows: int
    is_estimate: bool
    total: int
    p50: int
    p95: int
    max: int
    histogram: list[Bin]


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something that does not stop training but should be known; `line` is where it came first."""

    code: str
    text: str
    count: int
    line: int | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the doctor found.

    Args:
        error, fix: one sentence each when the outcome is not ready, else empty.
        container: jsonl, json, csv, parquet or text; `compression` is none, gzip or zstd.
        encoding: what the text is written in; other than utf-8 it is a guess that can be passed back to have
            the whole file converted (no guess is made where that would garble other rows).
        format: messages, sharegpt, alpaca, completion, text, preference or prompts; empty if unknown.
        kind: what a canonical row holds; one of `DatasetVersion.Kind` or empty.
        columns: every column seen in the first rows, in order; `unused_columns` did not reach the rows.
        mapping: the column mapping that was used; `suggested_mapping` is a guess to start from.
        num_rows: good rows; `rows.jsonl` holds them if the outcome is ready.
        num_empty: bad rows whose text is empty; `num_duplicates` good rows seen before
            (estimated from a share of the rows above four million).
        problems: the first 100; `problem_counts` counts them all by code.
        tokens: by name of the base model.
        sample: up to three raw rows, cut, for choosing a mapping.
    """

    outcome: Outcome
    error: str = ""
    fix: str = ""
    container: str = ""
    compression: str = ""
    encoding: str = ""
    format: str = ""
    kind: str = ""
    columns: list[str] = field(default_factory=list)
    unused_columns: list[str] = field(default_factory=list)
    mapping: dict[str, str] = field(default_factory=dict)
    suggested_mapping: dict[str, str] = field(default_factory=dict)
    sample: list[dict[str, str]] = field(default_factory=list)
    num_rows: int = 0
    num_bad_rows: int = 0
    num_bad_rows_written: int = 0
    num_duplicates: int = 0
    are_duplicates_estimated: bool = False
    num_empty: int = 0
    characters: Lengths | None = None
    tokens: dict[str, Lengths] = field(default_factory=dict)
    roles: dict[str, int] = field(default_factory=dict)
    warnings: list[Warned] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    problem_counts: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return asdict(self) | {"outcome": self.outcome.value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Return the report that `as_dict` gave."""
        lengths = values.get("characters")
        return cls(
            **{name: value for name, value in values.items() if name not in _NESTED},
            outcome=Outcome(values["outcome"]),
            characters=_lengths(lengths) if lengths else None,
            tokens={name: _lengths(one) for name, one in values.get("tokens", {}).items()},
            warnings=[Warned(**one) for one in values.get("warnings", [])],
            problems=[Problem(**one) for one in values.get("problems", [])],
        )


_NESTED: Final = {"outcome", "characters", "tokens", "warnings", "problems"}


def _lengths(values: Mapping[str, Any]) -> Lengths:
    return Lengths(**{**values, "histogram": [Bin(**one) for one in values["histogram"]]})
