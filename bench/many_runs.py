"""Many runs on one worker whose memory holds few of them: throughput, memory, and the bits they end with.

`python -m bench.many_runs [--runs 1000] [--fit 50] [--rounds 4]` trains the shipped model on the CPU and prints one
JSON line: for as many runs as fit, and for all of them, optimizer steps a second and the most memory that the
worker took; then how many of `--alone` runs, trained once more one at a time, ended with other weights or moments.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

from bench.instance import Instance, set_up_django

# An adapter of rank 1 on the shipped model: 21,760 numbers, four times (weights, two moments, gradient).
_ADAPTER_BYTES: Final = 21_760 * 16
_MIB: Final = 1 << 20


class PeakMemory:
    """Follows the resident memory of a process while in a `with` block."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self.first_mb = self.most_mb = self._now_mb()

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.wait(0.2):
            self.most_mb = max(self.most_mb, self._now_mb())

    def _now_mb(self) -> int:
        line = next(line for line in self._status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) // 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--fit", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--alone", type=int, default=20, help="runs to train once more, one at a time")
    options = parser.parse_args()
    room_mb = max(1, options.fit * _ADAPTER_BYTES // _MIB)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"MINTWEB_ADAPTER_MEMORY_MB": str(room_mb), "MINTWEB_LOG_LEVEL": "WARNING"}
        with Instance(Path(folder) / "data", **settings) as instance:
            set_up_django(instance)
            figures = measure(
                num_runs=options.runs,
                num_fitting=room_mb * _MIB // _ADAPTER_BYTES,
                num_rounds=options.rounds,
                num_alone=options.alone,
            )
    print(json.dumps(figures))


def measure(*, num_runs: int, num_fitting: int, num_rounds: int, num_alone: int) -> dict[str, Any]:
    """Return the figures; Django is set up for the instance."""
    from bench import fleet
    from runs.models import Worker

    pid = Worker.objects.get(stopped_at=None).pid
    figures: dict[str, Any] = {"runs": num_runs, "fit": num_fitting, "rounds": num_rounds}
    for name, number in (("fitting", num_fitting), ("all", num_runs)):
        with PeakMemory(pid) as memory:
            runs = fleet.Fleet(number)
            seconds = _train(runs, num_rounds)
            runs.save(range(number))
        figures[name] = {
            "steps_per_s": round(number * num_rounds / seconds, 1),
            "worker_mb_before": memory.first_mb,
            "worker_mb_most": memory.most_mb,
        }
    figures |= fleet.traces()
    figures["alone"] = num_alone
    figures["other_bits"] = _count_other_bits(runs, num_rounds, num_alone)
    return figures


def _train(runs: Any, num_rounds: int) -> float:
    """Train every run once a round, in random order; return the seconds."""
    from bench import fleet

    order = random.Random(0)
    started_at = time.monotonic()
    for round_number in range(num_rounds):
        chosen = order.sample(range(len(runs.runs)), len(runs.runs))
        fleet.wait(runs.train(chosen, round_number=round_number))
    return time.monotonic() - started_at


def _count_other_bits(runs: Any, num_rounds: int, num_alone: int) -> int:
    from bench import fleet

    alone, different = fleet.Fleet(num_alone), 0
    for seed in range(num_alone):
        for round_number in range(num_rounds):
            fleet.wait(alone.train([seed], round_number=round_number))
        alone.save([seed])
        different += alone.digests(seed) != runs.digests(seed)
    return different


if __name__ == "__main__":
    main()
