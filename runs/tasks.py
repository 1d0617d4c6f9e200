"""Celery tasks of the CPU worker: checks and housekeeping that may run late, twice or not at all for a while."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from celery import shared_task

from runs import events
from runs.recipes import tokens
from runs.services import (
    checkpoints,
    closed_sessions,
    dataset_checks,
    dataset_rows,
    deletions,
    disk,
    expired_operations,
    expired_samples,
    idempotency,
    leftovers,
    lockout,
    payload_files,
    state_folders,
    tallies,
    uploads,
    webhooks,
    workers,
)

logger = logging.getLogger(__name__)


@shared_task(name="runs.tasks.check_dataset", ignore_result=True)
def check_dataset(version_pk: int) -> None:
    """Look at a dataset version that waits for it."""
    dataset_checks.check(version_pk)


@shared_task(name="runs.tasks.deliver_webhooks", ignore_result=True)
def deliver_webhooks() -> None:
    """Send the messages to people's addresses that are due."""
    webhooks.deliver_due()


@shared_task(name="runs.tasks.housekeeping", ignore_result=True)
def housekeeping() -> None:
    """Enter the end of dead workers, delete what has expired or is cached too long, and begin lost checks anew.

    Raises:
        ExceptionGroup: what went wrong; it held up nothing else.
    """
    problems: list[Exception] = []
    for chore in _CHORES:
        try:
            chore()
        except Exception as error:  # a folder that vanished, a bucket that is away: no other chore's problem
            logger.exception("housekeeping: %s.%s failed", chore.__module__, chore.__name__)
            problems.append(error)
    if problems:
        raise ExceptionGroup("housekeeping", problems)


def _begin_lost_checks() -> None:
    for version_pk in dataset_checks.unfinished():
        events.ring_dataset_check(version_pk)


_CHORES: Final[Sequence[Callable[[], object]]] = (
    workers.bury_dead,
    checkpoints.delete_expired,
    closed_sessions.let_runs_go,
    expired_operations.forget,
    expired_samples.forget,
    payload_files.delete_orphans,
    deletions.add_loaded,
    deletions.delete_due,
    state_folders.delete_orphans,
    tokens.remove_unused,
    webhooks.forget_old,
    idempotency.forget_old,
    lockout.forget_old,
    tallies.add_up,
    uploads.clean_up,
    leftovers.delete_dataset_folders,
    leftovers.delete_temporary_files,
    dataset_rows.remove_unused_copies,
    disk.measure,
    _begin_lost_checks,
)
