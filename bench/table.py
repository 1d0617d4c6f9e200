"""One row per figure, shown as a table on the screen and in docs/benchmarks.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

_BEGIN, _END = "<!-- bench:begin -->", "<!-- bench:end -->"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured figure. `is_met` is None where there is no target.

    `seconds` are the single measurements of each candidate; `facts` are numbers that a picture needs.
    """

    measurement: str
    what: str
    measured: str
    target: str = ""
    is_met: bool | None = None
    note: str = ""
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts: Mapping[str, float | str] = field(default_factory=dict)


def ratio_row(
    measurement: str,
    what: str,
    slow: Sequence[float],
    fast: Sequence[float],
    *,
    at_least: float | None,
    note: str = "",
    seconds: Mapping[str, Sequence[float]] | None = None,
    facts: Mapping[str, float | str] | None = None,
) -> Row:
    """Return how many times faster `fast` is: the median over the rounds, with the range."""
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    middle = median(ratios)
    return Row(
        measurement=measurement,
        what=what,
        measured=f"{middle:.2f} x ({min(ratios):.2f} to {max(ratios):.2f})",
        target="" if at_least is None else f">= {at_least} x",
        is_met=None if at_least is None else middle >= at_least,
        note=note,
        seconds=seconds or {},
        facts=facts or {},
    )


def limit_row(
    measurement: str, what: str, value: float, *, at_most: float, unit: str = "", note: str = ""
) -> Row:
    """Return a figure that must not exceed a limit."""
    form = "{:.1f}" if unit == "ms" else "{:.2g}"
    return Row(
        measurement=measurement,
        what=what,
        measured=f"{form.format(value)} {unit}".strip(),
        target=f"<= {at_most:g} {unit}".strip(),
        is_met=value <= at_most,
        note=note,
    )


def markdown(rows: Sequence[Row]) -> str:
    """Return the table."""
    lines = ["| measurement | figure | target | measured | met | note |", "|---|---|---|---|---|---|"]
    for row in rows:
        met = {True: "yes", False: "no", None: ""}[row.is_met]
        cells = [row.measurement, row.what, row.target, row.measured, met, row.note]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_between_markers(document: Path, text: str) -> None:
    """Replace what stands between the markers of a document."""
    old = document.read_text(encoding="utf-8")
    pattern = f"{re.escape(_BEGIN)}.*{re.escape(_END)}"
    assert re.search(pattern, old, re.DOTALL), f"{document} lacks the markers {_BEGIN} {_END}"
    new = re.sub(pattern, lambda _: f"{_BEGIN}\n{text}\n{_END}", old, flags=re.DOTALL)
    document.write_text(new, encoding="utf-8")
