"""Celery tasks of the CPU worker: housekeeping that may run late, twice or not at all for a while."""

from __future__ import annotations

from celery import shared_task

from runs.services import checkpoints, workers


@shared_task(name="runs.tasks.housekeeping", ignore_result=True)
def housekeeping() -> None:
    """Enter the end of dead workers and delete expired checkpoints."""
    workers.bury_dead()
    checkpoints.delete_expired()
