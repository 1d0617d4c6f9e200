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
    return range_row(
        measurement,
        what,
        ratios,
        at_least=at_least,
        unit="x",
        note=note,
        seconds=seconds or {},
        facts=facts or {},
    )


def range_row(
    measurement: str,
    what: str,
    values: Sequence[float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    unit: str = "",
    note: str = "",
    seconds: Mapping[str, Sequence[float]] | None = None,
    facts: Mapping[str, float | str] | None = None,
) -> Row:
    """Return the median of some rounds, with the range where there were several, and at most one bound on it."""
    middle, unit = median(values), f" {unit}" if unit else ""
    bounds = {">=": at_least, "<=": at_most}
    target = "".join(f"{sign} {bound}{unit}" for sign, bound in bounds.items() if bound is not None)
    is_met = (at_least is None or middle >= at_least) and (at_most is None or middle <= at_most)
    span = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return Row(
        measurement=measurement,
        what=what,
        measured=f"{middle:.2f}{unit}{span}",
        target=target,
        is_met=is_met if target else None,
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


def is_reached(rows: Sequence[Row]) -> bool:
    """Return whether no measurement failed and every figure with a target reached it."""
    return all(row.is_met is not False and row.measured != "failed" for row in rows)


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
