"""Estimates how many tokens the rows have for a base model, from a seeded sample of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from runs.datasets.report import Lengths
from runs.datasets.rows import RowWriter
from runs.datasets.statistics import lengths_of_sample, text_of_row

MAX_SAMPLED: Final = 5_000
_MIN_SAMPLED: Final = 50
_SAMPLE_BYTES: Final = 12 * 2**20
_MAX_TEXT_CHARS: Final = 64 * 2**10
_BATCH_CHARS: Final = 256 * 2**10


def estimate(rows: RowWriter, tokenizer_json: Path, *, on_batch: Callable[[], None]) -> Lengths:
    """Return the lengths in tokens of the text of about 5,000 rows, fewer if rows are long.

    Of a text over 65,536 characters the beginning is counted and scaled up.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths: list[int] = []
    for texts in _batches(rows):
        encodings = tokenizer.encode_batch_fast(
            [text[:_MAX_TEXT_CHARS] for text in texts], add_special_tokens=False
        )
        for text, encoding in zip(texts, encodings, strict=True):
            lengths.append(round(len(encoding) * max(1.0, len(text) / _MAX_TEXT_CHARS)))
        on_batch()
    return lengths_of_sample(lengths, num_rows=rows.num_rows)


def _batches(rows: RowWriter) -> Iterator[list[str]]:
    mean_bytes = rows.size_bytes() / rows.num_rows
    wanted = max(_MIN_SAMPLED, int(_SAMPLE_BYTES / mean_bytes))
    count = min(rows.num_rows, MAX_SAMPLED, wanted)
    numbers = sorted(random.Random(0).sample(range(rows.num_rows), count))  # noqa: S311 - a sample, no secret
    texts: list[str] = []
    size = 0
    for row in rows.read(numbers):
        texts.append(text_of_row(row))
        size += min(len(texts[-1]), _MAX_TEXT_CHARS)
        if size >= _BATCH_CHARS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts
