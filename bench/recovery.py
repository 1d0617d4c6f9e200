"""How long a run stands still when its worker is killed: from the kill to the run's next commit, as `make up` starts it.

`python -m bench.recovery [--kills 20] [--workers 1] [--runs 4]` trains the shipped model on the CPU and prints one JSON
line. With one worker there is no spare: a fresh process has to start, to import torch and to load the model. With two
the other one takes the runs over.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from bench.instance import Instance, set_up_django

# Rounds that are queued when a worker is killed; one more comes right after, so that each run has something to commit.
_AHEAD: Final = 8
_PAUSE_S: Final = 2.0
_TIMEOUT_S: Final = 120.0
_LOOK_S: Final = 0.02


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--runs", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"MINTWEB_DEVICES": ",".join(["cpu"] * options.workers), "MINTWEB_LOG_LEVEL": "WARNING"}
        with Instance(Path(folder) / "data", **settings) as instance:
            set_up_django(instance)
            stood_still_s = measure(options.kills, options.runs, num_workers=options.workers)
    centiles = statistics.quantiles(stood_still_s, n=100, method="inclusive")
    figures = {
        "workers": options.workers,
        "kills": options.kills,
        "recovery_s": {
            "p50": round(centiles[49], 2),
            "p99": round(centiles[98], 2),
            "max": round(max(stood_still_s), 2),
            "n": len(stood_still_s),
        },
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(figures))


def measure(num_kills: int, num_runs: int, *, num_workers: int) -> list[float]:
    """Kill the worker that holds most runs, again and again; return the seconds that each of these runs stood still."""
    from bench import fleet

    runs = fleet.Fleet(num_runs)
    stood_still_s: list[float] = []
    rounds = (runs.train(range(num_runs), round_number=number) for number in itertools.count())
    for _ in range(num_kills):
        _wait_for_workers(num_workers)
        time.sleep(_PAUSE_S)
        for _ in range(_AHEAD):
            next(rounds)
        before, killed_at = _kill_worker()
        last = next(rounds)
        stood_still_s += _wait_for_commits(before, killed_at)
    fleet.wait(last)
    if fleet.traces()["recoveries"] == 0:
        raise RuntimeError("no run had to recover")
    return stood_still_s


def _kill_worker() -> tuple[dict[int, int], float]:
    """Kill the worker with most runs; return how far each of these was, and when."""
    from runs.models import TrainingRun
    from runs.services import workers

    worker = workers.with_state().filter(stopped_at=None).latest("num_runs")
    held = list(TrainingRun.objects.filter(worker=worker).values_list("pk", flat=True))
    os.kill(worker.pid, signal.SIGKILL)
    killed_at = time.monotonic()
    return _applied(held), killed_at


def _wait_for_commits(before: Mapping[int, int], since: float) -> list[float]:
    """Return, for each run, the seconds until it was farther."""
    back_s: dict[int, float] = {}
    while len(back_s) < len(before):
        if (waited_s := time.monotonic() - since) > _TIMEOUT_S:
            raise RuntimeError(f"{len(before) - len(back_s)} runs did not come back within {_TIMEOUT_S:g} s")
        now = _applied(before.keys() - back_s.keys())
        back_s |= {pk: waited_s for pk, seq in now.items() if seq > before[pk]}
        time.sleep(_LOOK_S)
    return list(back_s.values())


def _applied(pks: Iterable[int]) -> dict[int, int]:
    from runs.models import TrainingRun

    return dict(TrainingRun.objects.filter(pk__in=pks).values_list("pk", "applied_seq"))


def _wait_for_workers(number: int) -> None:
    from runs.services import workers

    deadline = time.monotonic() + _TIMEOUT_S
    while sum(worker.is_alive for worker in workers.recent(limit=100)) < number:  # type: ignore[attr-defined]
        if time.monotonic() > deadline:
            raise RuntimeError(f"there are not {number} workers within {_TIMEOUT_S:g} s")
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    main()
