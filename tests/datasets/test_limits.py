"""The check runs in a process of its own: bombs, endless lines and time end there, not here."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from runs.datasets.checking import Outcome, Progress, run

GOOD = b'{"prompt":"a","completion":"b"}\n'
TINY = Path("gpuworker/tiny/model/tokenizer.json").absolute()
# What the process allocates beyond its code; Python with NumPy and orjson needs about 60.
MEMORY_MB = 200


def test_it_returns_the_report_and_tells_how_far_it_is(tmp_path: Path) -> None:
    path = tmp_path / "original"
    path.write_bytes(b"".join(b'{"prompt":"%d","completion":"b"}\n' % number for number in range(100_000)))
    told: list[Progress] = []
    output = tmp_path / "output"
    report = run(path, "rows.jsonl", output, tokenizers={"tiny": TINY}, on_progress=told.append)
    assert (report.outcome, report.num_rows, report.num_duplicates) == (Outcome.READY, 100_000, 0)
    assert report.tokens["tiny"].num_rows == 5000
    assert told[-1] == Progress(share=1.0, num_rows=100_000, num_problems=0)
    assert [one.share for one in told] == sorted(one.share for one in told)
    assert {one.name for one in output.iterdir()} == {"rows.jsonl", "rows.idx", "report.json"}


def test_a_line_of_a_gigabyte_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "original"
    with path.open("wb") as file:
        file.write(GOOD + b'{"prompt":"' + b"x" * 100_000)
        file.seek(2**30)
        file.write(b'"}\n' + GOOD)
    report = run(path, "rows.jsonl", tmp_path / "output", memory_mb=MEMORY_MB, timeout_s=60)
    assert (report.outcome, report.num_rows, report.num_bad_rows) == (Outcome.NEEDS_CHOICE, 2, 1), (
        report.error
    )
    assert (report.problems[0].code, report.problems[0].line) == ("line_too_long", 2)


def test_an_array_with_an_endless_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "original"
    with path.open("wb") as file:
        file.write(b'[{"text":"')
        for _ in range(100):
            file.write(b"x" * 2**20)
    report = run(path, "rows.json", tmp_path / "output", memory_mb=MEMORY_MB, timeout_s=60)
    assert report.outcome is Outcome.FAILED
    assert report.problems[0].code == "line_too_long", report.error


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_bomb_is_refused(tmp_path: Path, pack: object) -> None:
    assert callable(pack)
    path = tmp_path / "original"
    path.write_bytes(pack(GOOD + b" " * (200 * 2**20)))
    report = run(path, "rows.jsonl", tmp_path / "output", memory_mb=MEMORY_MB, timeout_s=60)
    assert report.outcome is Outcome.FAILED
    assert "100 times its size" in report.error
    assert report.fix


def test_a_parquet_file_with_a_large_row_group_is_read(tmp_path: Path) -> None:
    source = random.Random(0)
    texts = [source.randbytes(4000).hex() for _ in range(20_000)]
    path = tmp_path / "original"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=len(texts), use_dictionary=False)
    assert path.stat().st_size > 70 * 2**20
    report = run(path, "rows.parquet", tmp_path / "output", memory_mb=MEMORY_MB, timeout_s=60)
    assert (report.outcome, report.num_rows) == (Outcome.READY, 20_000), report.error


def test_a_parquet_file_that_unpacks_to_gigabytes_ends_its_process_only(tmp_path: Path) -> None:
    path = tmp_path / "original"
    table = pa.table({"text": pa.array(["x" * 2**20]).take(pa.array([0] * 600))})
    pq.write_table(table, path, use_dictionary=False, data_page_size=2**30, compression="zstd")
    assert path.stat().st_size < 2**20
    report = run(path, "rows.parquet", tmp_path / "output", memory_mb=MEMORY_MB, timeout_s=60)
    assert report.outcome is Outcome.FAILED
    assert "memory" in report.error
    assert not list((tmp_path / "output").glob("rows*"))


def test_a_check_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "original"
    path.write_bytes(GOOD * 2_000_000)
    report = run(path, "rows.jsonl", tmp_path / "output", timeout_s=0.5)
    assert report.outcome is Outcome.FAILED
    assert "longer than 0.5 seconds" in report.error


def test_too_little_memory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "original"
    path.write_bytes(GOOD)
    report = run(path, "rows.jsonl", tmp_path / "output", memory_mb=8)
    assert report.outcome is Outcome.FAILED
    assert report.error
    assert report.fix


def test_an_error_of_the_caller_ends_the_check(tmp_path: Path) -> None:
    path = tmp_path / "original"
    path.write_bytes(GOOD * 500_000)

    def refuse(progress: Progress) -> None:
        raise ValueError(json.dumps(progress.num_rows))

    with pytest.raises(ValueError, match="0"):
        run(path, "rows.jsonl", tmp_path / "output", on_progress=refuse)
