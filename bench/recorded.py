"""Training passes recorded as CUDA graphs beside the same passes kernel by kernel, in one engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final
from unittest.mock import patch

from bench.candidates.data import engine_data
from bench.loaded import Bench
from bench.table import Row
from gpuworker.engine import lora_columns
from gpuworker.engine.train_graphs import TrainGraphs
from gpuworker.engine.types import Datum

_BATCHES: Final = {
    "1 run of 60 tokens": (1, 4, 8, 22),
    "8 runs of 60 tokens": (8, 4, 8, 22),
    "1 run of 230 tokens": (1, 4, 32, 83),
    "8 runs of 230 tokens": (8, 4, 32, 83),
    "1 run of 2200 tokens": (1, 8, 32, 512),
}
"""Runs, sequences of each, and the lengths they are spread over."""


def recorded(bench: Bench) -> Iterator[Row]:
    """Put recorded passes beside plain ones and beside recorded ones with grouped products, forward to optimizer step."""
    trainer = bench.engine.engine._trainer
    graphs = trainer._graphs
    assert graphs is not None, "passes are recorded on a GPU in half precision only"
    others = {
        "plain": None,
        "grouped": TrainGraphs(graphs._base, row_bytes=graphs._row_bytes, max_bytes=graphs._max_bytes),
    }
    for (name, (count, num_sequences, shortest, longest)), until in bench.paced(list(_BATCHES.items())):
        batches = [bench.batch(num_sequences, shortest, longest, seed=seed) for seed in range(count)]
        data = [engine_data(one.sequences()) for one in batches]

        def step(way: str, data: Sequence[tuple[Datum, ...]] = data) -> float:
            max_columns = 0 if way == "grouped" else lora_columns.MAX_COLUMNS
            with (
                patch.object(lora_columns, "MAX_COLUMNS", max_columns),
                patch.object(trainer, "_graphs", others.get(way, graphs)),
            ):
                return bench.engine.step(data)

        taken = bench.alternate({way: partial(step, way) for way in ("plain", "grouped", "recorded")}, until)
        num_tokens = sum(one.num_tokens for one in batches)
        for way, against in (("plain", "kernel by kernel"), ("grouped", "grouped products of adapters")):
            what = f"{name}: recorded against {against}"
            yield bench.ratio(what, taken, way, "recorded", num_tokens=num_tokens)
