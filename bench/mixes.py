"""A run's bits alone and among others: packing must not change them on a CPU."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from statistics import mean
from typing import Final

from bench.candidates.data import engine_data
from bench.loaded import RANKS, Bench
from bench.table import Row

_LENGTHS: Final = ((8, 22), (32, 83))


def mixes(bench: Bench) -> Iterator[Row]:
    """Compare gradients and log-probabilities of eight runs alone with those in random mixes of two to eight."""
    batches = [
        bench.batch(4, *_LENGTHS[run % len(_LENGTHS)], seed=run).sequences() for run in range(len(RANKS))
    ]
    data = [engine_data(sequences) for sequences in batches]
    bench.engine.step(data)  # until then B is zero, and with it the gradient of A
    alone = [bench.engine.digests([run], data)[0] for run in range(len(RANKS))]
    rng, num_mixes = random.Random(0), bench.plan.num_mixes
    sizes: list[int] = []
    num_same = 0
    for number in range(num_mixes):
        if number and time.monotonic() > bench.until:
            break
        chosen = rng.sample(range(len(RANKS)), rng.randint(2, len(RANKS)))
        num_same += bench.engine.digests(chosen, data) == [alone[run] for run in chosen]
        sizes.append(len(chosen))
    yield Row(
        measurement=bench.measurement,
        what="gradients and log-probabilities of every run in random mixes: those it has alone",
        target=f"same bits in {num_mixes} of {num_mixes}",
        measured=f"same bits in {num_same} of {len(sizes)}",
        is_met=num_same == num_mixes,
        note=f"{min(sizes)} to {max(sizes)} runs a mix in random order, {mean(sizes):.1f} on average",
    )
