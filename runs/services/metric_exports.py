"""Every stored value of a run as a file, made piece by piece: CSV, JSON or Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from runs.models import TrainingRun
from runs.services import metrics
from runs.services.metrics import Point
from runs.services.sinks import Sink

COLUMNS: Final = ("seq", "step", "recorded_at", "name", "value")
_PAGE_VALUES: Final = 10_000
_FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")
Pages = Iterator[Sequence[Point]]


def pages(run: TrainingRun, *, name: str = "") -> Pages:
    """Yield the values of a run, or those of one metric, up to where the run stands now."""
    # The file ends there, or that of a running run would never end.
    up_to_seq = metrics.last_seq(run)
    cursor = -1
    while cursor < up_to_seq:
        points = metrics.points_after(run, cursor, limit=_PAGE_VALUES)
        if not points:
            return
        cursor = points[-1].seq
        yield [point for point in points if point.seq <= up_to_seq and name in ("", point.name)]


def as_csv(listed: Pages) -> Iterator[bytes]:
    """Yield a CSV file; what is not finite is NaN, Infinity or -Infinity."""
    yield (",".join(COLUMNS) + "\r\n").encode()
    for points in listed:
        text = io.StringIO()
        csv.writer(text).writerows(
            (
                point.seq,
                point.step,
                point.recorded_at.isoformat(),
                safe_cell(point.name),
                repr(point.value) if math.isfinite(point.value) else metrics.word(point.value),
            )
            for point in points
        )
        yield text.getvalue().encode()


def as_json(listed: Pages) -> Iterator[bytes]:
    """Yield a JSON list of objects; a value that is not finite is null, and `nonfinite` says which."""
    separator = "["
    for points in listed:
        lines = (json.dumps(_object(point), allow_nan=False, separators=(",", ":")) for point in points)
        text = ",\n".join(lines)
        if text:
            yield (separator + text).encode()
            separator = ",\n"
    yield (separator if separator == "[" else "").encode() + b"]\n"


def as_parquet(listed: Pages) -> Iterator[bytes]:
    """Yield a Parquet file, a row group for each page."""
    import pyarrow as pa  # half a second and 50 MB that only this needs
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("seq", pa.int64()),
            ("step", pa.int64()),
            ("recorded_at", pa.timestamp("us", tz="UTC")),
            ("name", pa.string()),
            ("value", pa.float64()),
        ]
    )
    sink = Sink()
    with pq.ParquetWriter(pa.PythonFile(sink, mode="w"), schema, compression="zstd") as writer:
        for points in listed:
            columns = [[getattr(point, name) for point in points] for name in COLUMNS]
            writer.write_table(pa.table(dict(zip(COLUMNS, columns, strict=True)), schema=schema))
            yield sink.take()
    yield sink.take()


FORMATS: Final[Mapping[str, tuple[str, Callable[[Pages], Iterator[bytes]]]]] = {
    "csv": ("text/csv; charset=utf-8", as_csv),
    "json": ("application/json", as_json),
    "parquet": ("application/vnd.apache.parquet", as_parquet),
}


def safe_cell(text: str) -> str:
    """Return a text that a spreadsheet will not run as a formula; numbers are never passed here."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _object(point: Point) -> dict[str, object]:
    is_finite = math.isfinite(point.value)
    values: dict[str, object] = {
        "seq": point.seq,
        "step": point.step,
        "recorded_at": point.recorded_at.isoformat(),
        "name": point.name,
        "value": point.value if is_finite else None,
    }
    return values if is_finite else {**values, "nonfinite": metrics.word(point.value)}
