"""What the doctor found, as a dataset's page shows it: figures, lengths as bars, problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from runs.datasets.problems import Problem
from runs.datasets.report import Lengths, Report, Warned
from runs.models import DatasetVersion
from runs.services import base_models
from runs.templatetags.formats import count, filesize

# The picture of a histogram, in its own units.
WIDTH: Final = 400
_HEIGHT: Final = 96
_TOP: Final = 8
_GAP: Final = 2
_MAX_LABELS: Final = 6
_FORMATS: Final = {
    "messages": "messages",
    "sharegpt": "ShareGPT conversations",
    "alpaca": "instruction, input, output",
    "completion": "prompt and completion",
    "chat_completion": "prompt and completion as messages",
    "preference": "chosen and rejected",
    "prompts": "prompt and reference answer",
    "text": "raw text",
}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a histogram in the picture's units; `is_cut` if its rows are longer than the model reads."""

    x: float
    y: float
    width: float
    height: float
    title: str
    is_cut: bool


@dataclass(frozen=True, kw_only=True)
class Label:
    """A number below a histogram."""

    x: float
    text: str
    anchor: str


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """The lengths of the rows by one measure."""

    name: str
    unit: str
    lengths: Lengths
    bars: list[Bar]
    labels: list[Label]
    limit: int
    cut_share: float
    summary: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A name and a value; `tone` colours what should be looked at."""

    name: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportView:
    """A report, ready to be shown."""

    figures: list[Figure]
    warnings: list[Warned]
    problems: list[Problem]
    problem_counts: list[tuple[str, int]]
    num_bad_rows: int
    num_good_rows: int
    is_parquet: bool
    histograms: list[Histogram]
    columns: list[str]
    encoding: str


def report_of(version: DatasetVersion) -> ReportView | None:
    """Return what was found in a version, None before its first check is over."""
    if not version.report:
        return None
    report = Report.from_dict(version.report)
    counts = sorted(report.problem_counts.items(), key=lambda pair: -pair[1])
    return ReportView(
        figures=_figures(version, report),
        warnings=report.warnings,
        problems=_with_place(report.problems),
        problem_counts=[(code.replace("_", " "), number) for code, number in counts],
        num_bad_rows=report.num_bad_rows,
        num_good_rows=report.num_rows,
        is_parquet=report.container == "parquet",
        histograms=_histograms(report),
        columns=report.columns,
        encoding=report.encoding if report.encoding not in ("utf-8", version.encoding) else "",
    )


def _figures(version: DatasetVersion, report: Report) -> list[Figure]:
    if not report.num_rows and not report.num_bad_rows:
        return []
    container = {"jsonl": "JSONL", "json": "JSON", "csv": "CSV", "parquet": "Parquet", "text": "text"}
    packed = f", {report.compression}" if report.compression not in ("", "none") else ""
    file = f"{container.get(report.container, report.container)}{packed}"
    figures = [
        Figure(name="Rows", value=count(report.num_rows)),
        Figure(name="File", value=filesize(version.size_bytes), note=file.strip(", ")),
    ]
    if report.format:
        figures.append(Figure(name="Format", value=_FORMATS.get(report.format, report.format)))
    if report.roles:
        roles = ", ".join(f"{count(number)} {role}" for role, number in report.roles.items())
        figures.append(Figure(name="Messages", value=count(sum(report.roles.values())), note=roles))
    if report.encoding and report.encoding != "utf-8":
        figures.append(Figure(name="Encoding", value=report.encoding))
    about = "about " if report.are_duplicates_estimated else ""
    figures += [
        _to_look_at("Duplicates", report.num_duplicates, about=about),
        _to_look_at("Bad rows", report.num_bad_rows, is_left_out=version.skip_bad_rows),
        _to_look_at("Empty rows", report.num_empty, is_left_out=version.skip_bad_rows),
    ]
    if report.unused_columns:
        names = ", ".join(report.unused_columns[:20])
        figures.append(Figure(name="Unused columns", value=count(len(report.unused_columns)), note=names))
    return figures


def _with_place(problems: list[Problem]) -> list[Problem]:
    """Return the problems, none if the only one is of the whole file: its state says it already."""
    return problems if len(problems) > 1 or any(one.line or one.field for one in problems) else []


def _to_look_at(name: str, number: int, *, about: str = "", is_left_out: bool = False) -> Figure:
    note = "left out" if number and is_left_out else ""
    return Figure(name=name, value=f"{about}{count(number)}", note=note, tone="warn" if number else "")


def _histograms(report: Report) -> list[Histogram]:
    limits = {info.name: info.max_context for info in base_models.available()}
    found = [
        _histogram(name, "tokens", lengths, limit=limits.get(name, 0))
        for name, lengths in report.tokens.items()
    ]
    if report.characters is not None:
        found.append(_histogram("Characters", "characters", report.characters, limit=0))
    return found


def _histogram(name: str, unit: str, lengths: Lengths, *, limit: int) -> Histogram:
    bins = lengths.histogram
    width = WIDTH / len(bins)
    highest = max(one.count for one in bins)
    bars = []
    for number, one in enumerate(bins):
        height = max((_HEIGHT - _TOP) * one.count / highest, 1.0) if one.count else 0.0
        bars.append(
            Bar(
                x=round(number * width + _GAP / 2, 1),
                y=round(_HEIGHT - height, 1),
                width=round(max(min(width, 60) - _GAP, 1), 1),
                height=round(height, 1),
                title=f"{count(one.count)} rows of {count(one.low)} to {count(one.high)} {unit}",
                is_cut=bool(limit) and one.low > limit,
            )
        )
    cut = sum(one.count for one in bins if limit and one.low > limit)
    about = "about " if lengths.is_estimate else ""
    summary = (
        f"{about}{count(lengths.total)} {unit}; half of the rows have at most {count(lengths.p50)}, "
        f"95\u00a0% at most {count(lengths.p95)}, the longest {count(lengths.max)}"
    )
    return Histogram(
        name=name,
        unit=unit,
        lengths=lengths,
        bars=bars,
        labels=_labels([one.low for one in bins], width),
        limit=limit,
        cut_share=cut / sum(one.count for one in bins),
        summary=summary,
    )


def _labels(lows: Sequence[int], width: float) -> list[Label]:
    """Return the lower ends of some bins, so few that they do not touch."""
    every = -(-len(lows) // _MAX_LABELS)
    return [
        Label(x=round(number * width + 1, 1), text=count(low), anchor="start")
        for number, low in enumerate(lows)
        if number % every == 0
    ]
