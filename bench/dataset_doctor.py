"""Measures the dataset doctor on a file of chat rows: rows and megabytes a second, peak memory of its process.

`python -m bench.dataset_doctor [--rows 1000000] [--row-bytes 1000]` prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

import orjson

from runs.datasets.checking import run

_WORDS = (
    "model",
    "learns",
    "to",
    "answer",
    "question",
    "island",
    "sailor",
    "map",
    "storm",
    "größe",
    "数据",
    "模型",
)
_NUM_TEXTS = 2_000
_TINY = Path(__file__).parents[1] / "gpuworker" / "tiny" / "model" / "tokenizer.json"


def write_rows(path: Path, *, num_rows: int, row_bytes: int) -> None:
    """Write chat rows of about this size, each different."""
    source = random.Random(0)
    size = max(8, row_bytes // 24)
    texts = [" ".join(source.choices(_WORDS, k=size)) for _ in range(_NUM_TEXTS)]
    with path.open("wb", buffering=2**20) as file:
        for number in range(num_rows):
            messages = [
                {"role": "system", "content": "You answer briefly."},
                {"role": "user", "content": f"{number}: {source.choice(texts)}"},
                {"role": "assistant", "content": source.choice(texts)},
                {"role": "user", "content": source.choice(texts)[:100]},
                {"role": "assistant", "content": source.choice(texts)},
            ]
            file.write(orjson.dumps({"messages": messages}) + b"\n")


def measure(*, num_rows: int, row_bytes: int, tokenizer: Path) -> dict[str, object]:
    """Return the figures of one check."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, num_rows=num_rows, row_bytes=row_bytes)
        size_mb = path.stat().st_size / 1e6
        start = time.perf_counter()
        report = run(path, path.name, Path(folder) / "out", tokenizers={"tiny": tokenizer})
        duration_s = time.perf_counter() - start
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {
        "rows": report.num_rows,
        "outcome": report.outcome.value,
        "size_mb": round(size_mb, 1),
        "duration_s": round(duration_s, 2),
        "mb_per_s": round(size_mb / duration_s, 1),
        "rows_per_s": round(report.num_rows / duration_s),
        "peak_rss_mb": round(peak_mb, 1),
        "tokens_sampled": report.tokens["tiny"].num_rows if report.tokens else 0,
        "error": report.error,
    }


def main() -> None:
    """Print the figures as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--row-bytes", type=int, default=1_000)
    parser.add_argument("--tokenizer", type=Path, default=_TINY)
    options = parser.parse_args()
    print(
        json.dumps(measure(num_rows=options.rows, row_bytes=options.row_bytes, tokenizer=options.tokenizer))
    )


if __name__ == "__main__":
    main()
