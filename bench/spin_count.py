"""How long a worker's threads should spin before they sleep: the same work in processes that differ in GOMP_SPINCOUNT.

`python -m bench.spin_count [--spins 1000 2500 5000 10000] [--rounds 8] [--busy 0.3]` prints a table: the speed of three
pieces of work of shape S over that with the first count. `--busy` is the part of a core that another program takes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Final

from bench.companion import Companion

_BUSY: Final = """
import sys, time
busy_s = float(sys.argv[1]) / 100
while True:
    until = time.perf_counter() + busy_s
    while time.perf_counter() < until:
        pass
    time.sleep(0.01 - busy_s)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spins", type=int, nargs="+", default=[1000, 2500, 5000, 10000])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--busy", type=float, default=0.0)
    options = parser.parse_args()
    print("| work | " + " | ".join(map(str, options.spins)) + " |")
    print("|---" * (len(options.spins) + 1) + "|")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes = {}
        for spins in options.spins:
            env = {
                "GOMP_SPINCOUNT": str(spins),
                "OMP_NUM_THREADS": str(os.cpu_count()),
                "HF_HUB_OFFLINE": "1",
            }
            process = Companion(Path(sys.executable), "bench.spun_work", env, log=Path(folder) / "log")
            processes[spins] = stack.enter_context(process)
        stack.enter_context(_busy(options.busy))
        for work in processes[options.spins[0]].ask("names"):
            speeds = _speeds(processes, work, options.rounds)
            print(f"| {work} | " + " | ".join(speeds) + " |", flush=True)


def _speeds(processes: Mapping[int, Companion], work: str, rounds: int) -> list[str]:
    """Return the speed of each process over the first one's, the median of neighbours, with smallest and largest."""
    for process in processes.values():
        process.ask("run", work=work)
    taken: dict[int, list[float]] = {spins: [] for spins in processes}
    for _ in range(rounds):
        for spins, process in processes.items():
            taken[spins].append(process.ask("run", work=work))
    first = next(iter(taken.values()))
    ratios = [[one / other for one, other in zip(first, own, strict=True)] for own in taken.values()]
    return [f"{median(own):.2f} ({min(own):.2f} to {max(own):.2f})" for own in ratios]


@contextlib.contextmanager
def _busy(part: float) -> Iterator[None]:
    """Let another process take this part of a core meanwhile."""
    if part <= 0:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", _BUSY, str(min(part, 1.0))])
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
