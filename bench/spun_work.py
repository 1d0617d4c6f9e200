"""Pieces of work of shape S in a process of its own, for `bench.spin_count`, which sets how its threads wait."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

from bench.batches import Batch
from bench.candidates.data import engine_data
from bench.candidates.engine_runs import EngineRuns
from bench.companion import serve
from bench.loaded import RANKS
from bench.shapes import RandomModel
from bench.timing import timed


def names() -> list[str]:
    """Return what can be run."""
    return list(_works())


def run(work: str) -> float:
    """Return the seconds of a piece of work."""
    return timed(_works()[work], torch.device("cpu"))


@cache
def _works() -> Mapping[str, Callable[[], object]]:
    with tempfile.TemporaryDirectory() as folder:
        model = RandomModel("S", Path(folder), device="cpu", dtype="float32")
        runs = EngineRuns(model.engine(), RANKS)
    vocab_size = model.shape.vocab_size
    mixed = Batch(num_sequences=8, shortest=32, longest=512, seed=0, vocab_size=vocab_size, skew=1.5)
    short = [
        Batch(num_sequences=4, shortest=8, longest=22, seed=i, vocab_size=vocab_size)
        for i in range(len(RANKS))
    ]
    one, eight = [engine_data(mixed.sequences())], [engine_data(batch.sequences()) for batch in short]
    prompts = [(number % 4, batch.sequences()[0]) for number, batch in enumerate(short)]
    return {
        "one run of mixed lengths": lambda: runs.step(one),
        "8 runs of 60 tokens": lambda: runs.step(eight),
        "sampling 8 sequences with 4 adapters": lambda: runs.sample(prompts, 16),
    }


if __name__ == "__main__":
    serve({"names": names, "run": run})
