"""The chaos GPU worker: the product's, under Celery as in production, with another engine or a shorter lease.

Also runs by itself: `python -m tests.chaos.worker NAME chain`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from celery.signals import celeryd_after_setup

from mintweb.celery import app

if TYPE_CHECKING:
    from gpuworker.worker import GpuWorker

# What a test may shorten: seconds of lease, of heartbeat, and of compute that may have to be replayed.
PACE: Mapping[str, float] = {"lease_s": 2.0, "heartbeat_s": 0.5, "replay_budget_s": 0.05}
_LOOK_S: Final = 0.02


def run(name: str, *, engine: str, pace: Mapping[str, float]) -> None:
    """Be a GPU worker until a signal ends this process."""
    from gpuworker import tasks

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    celeryd_after_setup.disconnect(tasks.start)
    make = _maker(engine)

    def start(instance: Any, **_: Any) -> None:
        _set_pace(pace)
        threading.Thread(target=_arm_when_told, name="arms", daemon=True).start()
        threading.Thread(target=tasks.begin, args=(make,), name="boot", daemon=True).start()

    celeryd_after_setup.connect(start, weak=False)
    options = ["--pool=solo", "--concurrency=1", "--queues=gpu", f"--hostname={name}@%h"]
    quiet = ["--without-mingle", "--without-gossip", "--without-heartbeat"]
    app.worker_main(["--skip-checks", "worker", "--include=gpuworker.tasks", *options, *quiet])


def _arm_when_told() -> None:
    """Replace the armed failpoints by those in this process's file, whenever the driver writes one."""
    from django.conf import settings

    from gpuworker import failpoints

    orders = Path(settings.DATA_DIR) / "arms" / str(os.getpid())
    orders.unlink(missing_ok=True)  # of a process that had the same number
    while True:
        time.sleep(_LOOK_S)
        if orders.exists():
            text = orders.read_text()
            orders.unlink()
            failpoints.arm(text)


def _maker(engine: str) -> Callable[[], GpuWorker]:
    from gpuworker.worker import GpuWorker

    if engine == "torch":
        return GpuWorker
    from tests.chaos.engine import load_engines

    return lambda: GpuWorker(load_engines=load_engines)


def _set_pace(pace: Mapping[str, float]) -> None:
    """Shorten what would make faults rare; safety must not depend on any of it."""
    from gpuworker import scheduler
    from runs.services import workers

    if pace:
        workers.LEASE_S, workers.HEARTBEAT_S = pace["lease_s"], pace["heartbeat_s"]  # type: ignore[misc, assignment]
        scheduler.REPLAY_BUDGET_S = pace["replay_budget_s"]  # type: ignore[misc]


if __name__ == "__main__":
    run(sys.argv[1], engine=sys.argv[2], pace=PACE)
