"""Measures what snapshots cost a run that trains: the same steps with the worker's policy and without any.

`python -m bench.snapshot_cost [--rank 32] [--rounds 3] [--budget-s 20]` prints one JSON line. A round trains for one
budget of compute and keeps one state as the worker does (copied at the boundary of an operation, written by another
thread while the next steps are computed), then trains as many steps without. `ratio` is the median over the rounds of
the first's time over the second's; `share` is the copying and writing alone, over the time of the steps, so that it
holds on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.batches import Batch
from gpuworker.engine import checkpoints
from gpuworker.engine.adapters import AdapterState
from gpuworker.engine.engine import Engine
from gpuworker.engine.types import AdamParams, Datum, ForwardBackward, LoraSpec, OptimStep

_TINY = Path(__file__).parents[1] / "gpuworker" / "tiny" / "model"
_ADAPTER = "run"
_NAME = "mintweb/tiny"


@dataclass
class Spent:
    """Seconds of one kept state: the copy stops the steps, writing goes on beside them."""

    copy_s: float = 0.0
    write_s: float = 0.0
    write_cpu_s: float = 0.0
    size_bytes: int = 0


class Writer:
    """Writes states in a thread of its own, as the committer does."""

    def __init__(self, folder: Path, spent: Spent) -> None:
        self._folder = folder
        self._spent = spent
        self._threads: list[threading.Thread] = []

    def put(self, state: AdapterState, name: str) -> None:
        """Begin to write a state."""
        thread = threading.Thread(target=self._write, args=(state, self._folder / name))
        thread.start()
        self._threads.append(thread)

    def flush(self) -> None:
        """Wait until everything is on the disk."""
        for thread in self._threads:
            thread.join()

    def _write(self, state: AdapterState, directory: Path) -> None:
        began, cpu_began = time.perf_counter(), time.thread_time()
        checkpoints.write(state, directory, base_model=_NAME)
        self._spent.write_s += time.perf_counter() - began
        self._spent.write_cpu_s += time.thread_time() - cpu_began
        self._spent.size_bytes = sum(file.stat().st_size for file in directory.iterdir())


def step(engine: Engine, data: tuple[Datum, ...]) -> None:
    """Train one step."""
    (answer,) = engine.forward_backward(
        [ForwardBackward(adapter_id=_ADAPTER, data=data, loss_fn="cross_entropy")]
    )
    assert not isinstance(answer, Exception), answer
    engine.optim_step([OptimStep(adapter_id=_ADAPTER, params=AdamParams(learning_rate=1e-4))])


def train_and_keep(
    engine: Engine, data: tuple[Datum, ...], budget_s: float, folder: Path
) -> tuple[int, float, Spent]:
    """Train for a budget of compute with a snapshot in the middle; returns the steps, their time and what it cost."""
    spent = Spent()
    writer = Writer(folder, spent)
    began = time.perf_counter()
    num_steps, is_kept = 0, False
    while (elapsed_s := time.perf_counter() - began) < budget_s:
        if not is_kept and elapsed_s > budget_s / 2:
            copy_began = time.perf_counter()
            state = engine.export_state(_ADAPTER, optimizer=True, gradients=True)
            spent.copy_s += time.perf_counter() - copy_began
            writer.put(state, f"{num_steps}")
            is_kept = True
        step(engine, data)
        num_steps += 1
    writer.flush()
    return num_steps, time.perf_counter() - began, spent


def train(engine: Engine, data: tuple[Datum, ...], num_steps: int) -> float:
    """Train so many steps; returns their seconds."""
    began = time.perf_counter()
    for _ in range(num_steps):
        step(engine, data)
    return time.perf_counter() - began


def measure(*, rank: int, rounds: int, budget_s: float, directory: Path, device: str) -> dict[str, object]:
    """Return the figures."""
    engine = Engine.load(directory, device=device, dtype="auto")
    engine.create_adapter(_ADAPTER, LoraSpec(rank=rank, seed=1))
    data = _data(engine.vocab_size)
    train(engine, data, 3)
    ratios, shares, costs = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            num_steps, with_s, spent = train_and_keep(engine, data, budget_s, Path(folder) / str(number))
            without_s = train(engine, data, num_steps)
            ratios.append(with_s / without_s)
            shares.append((spent.copy_s + spent.write_cpu_s) / with_s)
            costs.append(spent)
    return {
        "device": engine.fingerprint["device"],
        "rank": rank,
        "rounds": rounds,
        "budget_s": budget_s,
        "snapshot_mb": round(costs[-1].size_bytes / 1e6, 1),
        "copy_ms": round(1000 * statistics.median(spent.copy_s for spent in costs), 1),
        "write_ms": round(1000 * statistics.median(spent.write_s for spent in costs), 1),
        "write_cpu_ms": round(1000 * statistics.median(spent.write_cpu_s for spent in costs), 1),
        "share": round(statistics.median(shares), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def _data(vocab_size: int) -> tuple[Datum, ...]:
    batch = Batch(num_sequences=8, shortest=32, longest=256, seed=1, vocab_size=vocab_size)
    return tuple(
        Datum(
            tokens=np.array(tokens[:-1]),
            target_tokens=np.array(tokens[1:]),
            inputs={"weights": np.ones(len(tokens) - 1, dtype=np.float32)},
        )
        for tokens in batch.sequences()
    )


def main() -> None:
    """Measure with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--budget-s", type=float, default=20.0, help="the worker's: REPLAY_BUDGET_S of its scheduler"
    )
    parser.add_argument("--base-model", type=Path, default=_TINY)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    figures = measure(
        rank=options.rank,
        rounds=options.rounds,
        budget_s=options.budget_s,
        directory=options.base_model,
        device=options.device,
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
