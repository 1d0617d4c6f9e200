"""Training passes recorded as CUDA graphs beside the same passes kernel by kernel, in one engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from bench.candidates.data import engine_data
from bench.loaded import Bench
from bench.table import Row

_BATCHES: Final = {
    "1 run of 60 tokens": (1, 4, 8, 22),
    "8 runs of 60 tokens": (8, 4, 8, 22),
    "1 run of 230 tokens": (1, 4, 32, 83),
    "8 runs of 230 tokens": (8, 4, 32, 83),
    "1 run of 2200 tokens": (1, 8, 32, 512),
}
"""Runs, sequences of each, and the lengths they are spread over."""


def recorded(bench: Bench) -> Iterator[Row]:
    """Put recorded passes beside plain ones, forward to optimizer step."""
    trainer = bench.engine.engine._trainer
    graphs = trainer._graphs
    for (name, (count, num_sequences, shortest, longest)), until in bench.paced(list(_BATCHES.items())):
        batches = [bench.batch(num_sequences, shortest, longest, seed=seed) for seed in range(count)]
        data = [engine_data(one.sequences()) for one in batches]

        def step(chosen: object, data: object = data) -> float:
            trainer._graphs = chosen
            return bench.engine.step(data)

        try:
            taken = bench.alternate({"plain": lambda: step(None), "recorded": lambda: step(graphs)}, until)
        finally:
            trainer._graphs = graphs
        num_tokens = sum(one.num_tokens for one in batches)
        yield bench.ratio(
            f"{name}: recorded against kernel by kernel", taken, "plain", "recorded", num_tokens=num_tokens
        )
