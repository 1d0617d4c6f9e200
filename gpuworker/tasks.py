"""Celery's side of the GPU worker: the doorbell task and the process's start and end.

The process runs `celery worker --pool=solo -c 1 -Q gpu`. Messages carry nothing; losing or doubling
one changes nothing (see `docs/architecture.md`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import shared_task
from celery.signals import celeryd_after_setup, worker_shutdown, worker_shutting_down

from runs import heap

if TYPE_CHECKING:
    from gpuworker.worker import GpuWorker

logger = logging.getLogger(__name__)
_worker: GpuWorker | None = None


@shared_task(name="gpuworker.tasks.drain", ignore_result=True, expires=30)
def drain() -> None:
    """Do the waiting work, for at most one slice."""
    if _worker is not None:
        _worker.drain_slice()


@celeryd_after_setup.connect
def start(instance: Any, **_: Any) -> None:
    """Load the base models and begin, in the process that serves the gpu queue only.

    Celery is not ready before Redis answers; this does not wait for that.
    """
    if "gpu" in instance.app.amqp.queues.consume_from:
        threading.Thread(target=_start, name="boot", daemon=True).start()


@worker_shutting_down.connect
def begin_to_stop(**_: Any) -> None:
    """Let a running slice end soon."""
    if _worker is not None:
        _worker.scheduler.end_soon()


@worker_shutdown.connect
def stop(**_: Any) -> None:
    """Keep every run's state and set the runs free."""
    if _worker is not None:
        _worker.stop()


def begin(make_worker: Callable[[], GpuWorker]) -> None:
    """Make this process's worker and let it take work; an error ends the process."""
    global _worker
    try:
        worker = make_worker()
        worker.start()
    except Exception:
        logger.exception("the GPU worker could not start; the process ends so that a fresh one tries again")
        os._exit(3)
    _worker = worker


def _start() -> None:
    begin(_make_worker)


def _make_worker() -> GpuWorker:
    """Import torch only here: the CPU worker shares this module's task names, not its weight."""
    with heap.lasting():
        from gpuworker.worker import GpuWorker

    return GpuWorker()
