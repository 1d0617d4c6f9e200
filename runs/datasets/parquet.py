"""Reads rows from Parquet, a few at a time; lines are row numbers from 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from runs.datasets.problems import FileRefused, Problem
from runs.datasets.sources import Source

_BATCH_BYTES: Final = 4 * 2**20
_MAX_BATCH: Final = 1_000
_BUFFER_BYTES: Final = 2**20
_MAGIC: Final = b"PAR1"
_AGAIN: Final = "write it again (`df.to_parquet`), compare the sizes, and upload that"


def columns_of(source: Source) -> list[str]:
    """Return the names of the columns.

    Raises:
        FileRefused: the file is cut off, encrypted or damaged.
    """
    file = _open(source.path)
    return [str(name) for name in file.schema_arrow.names]


def read_parquet(source: Source, columns: list[str] | None = None) -> Iterator[tuple[int, object]]:
    """Yield the rows as dicts; nulls inside nested values are left out.

    Args:
        columns: the only ones to read; None reads all.

    Raises:
        FileRefused: the file is cut off, encrypted or damaged.
    """
    import pyarrow as pa

    file = _open(source.path)
    number = 0
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
        size = min(max(_BATCH_BYTES // row_bytes, 1), _MAX_BATCH)
        try:
            for batch in file.iter_batches(size, row_groups=[index], columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: without_nulls(value) for name, value in row.items()}
                source.num_read = source.size_bytes * number // max(1, file.metadata.num_rows)
                source.on_block()
        except MemoryError:
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise FileRefused(_damaged(str(error), number + 1)) from error


def without_nulls(value: Any) -> Any:
    """Return a nested value without the nulls that Arrow adds for keys which other rows have."""
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


def _open(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _refuse_by_ends(path)
    try:
        return pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except MemoryError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise FileRefused(_damaged(str(error), None)) from error


def _refuse_by_ends(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, path.stat().st_size - 4))
        end = file.read(4)
    if b"PARE" in (start, end):
        fix = "write it without encryption and upload that"
        raise FileRefused(Problem(code="encrypted", reason="the Parquet file is encrypted", fix=fix))
    if end != _MAGIC:
        reason = "the Parquet file has no footer: it was cut off"
        raise FileRefused(Problem(code="truncated_file", reason=reason, fix=_AGAIN))


def _damaged(detail: str, line: int | None) -> Problem:
    if "encrypt" in detail.lower():
        fix = "write it without encryption and upload that"
        return Problem(
            code="encrypted", reason="columns of the Parquet file are encrypted", fix=fix, line=line
        )
    reason = f"the Parquet file is damaged: {detail.strip().splitlines()[0][:160]}"
    return Problem(code="damaged_file", reason=reason, fix=_AGAIN, line=line)
