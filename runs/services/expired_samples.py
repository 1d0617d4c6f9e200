"""Samples that nobody will read any more, and the sessions in which they were asked for.

Payload and answer of a sample go a day after it was answered, once its client has left; what is asked for then is
told that it is gone. The rows go with a session that was closed, or whose client was silent for so long that it will
not come back: until then a client goes on with the sampling sessions it had. What was drawn from a run's own weights,
or for its fixed prompts, is shown on the run's page and goes with the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from django.db import connection, transaction
from django.db.models import Q, QuerySet
from django.utils import timezone

from runs.models import Operation, SamplingSession, Session
from runs.services import blobs, payload_files, sessions
from runs.services.expired_operations import KEEP_RESULTS

KEEP_SILENT: Final = timedelta(days=30)
_BATCH: Final = 500
_BATCHES_AT_ONCE: Final = 200
_KEPT: Final = Q(payload__isnull=False) | ~Q(payload_file="") | Q(result__isnull=False)


def forget() -> None:
    """Delete what has become useless; what is more than some good batches waits for the next time."""
    until = time.monotonic() + blobs.CLEANUP_S
    for step in (_forget_content, _forget_rows, _forget_sampling_sessions, _forget_sessions):
        for _ in range(_BATCHES_AT_ONCE):
            if not step() or time.monotonic() > until:
                break


def _forget_content() -> bool:
    """Delete one batch of payloads and answers; false when there was nothing left."""
    rows = _answered(sessions.over()).filter(_KEPT, finished_at__lt=timezone.now() - KEEP_RESULTS)
    with transaction.atomic():
        batch = list(rows.values_list("pk", "payload_file")[:_BATCH])
        chosen = Operation.objects.filter(pk__in=[pk for pk, _ in batch])
        chosen.update(payload=None, payload_file="", result=None)
        names = {name for _, name in batch if name}
        payload_files.delete_after_commit(names)
    return bool(batch)


def _forget_rows() -> bool:
    rows = _answered(_past()).exclude(_KEPT)
    return _delete(
        "DELETE FROM runs_operation WHERE id = ANY(%s)", rows.values_list("pk", flat=True)[:_BATCH]
    )


def _forget_sampling_sessions() -> bool:
    rows = SamplingSession.objects.filter(run=None, session__in=_past(), operations=None)
    return _delete(
        "DELETE FROM runs_samplingsession WHERE id = ANY(%s)", rows.values_list("pk", flat=True)[:_BATCH]
    )


def _forget_sessions() -> bool:
    rows = _past().filter(training_runs=None, sampling_sessions=None)
    return _delete("DELETE FROM runs_session WHERE id = ANY(%s)", rows.values_list("pk", flat=True)[:_BATCH])


def _past() -> QuerySet[Session]:
    return sessions.past(finished=KEEP_RESULTS, silent=KEEP_SILENT)


def _answered(clients: QuerySet[Session]) -> QuerySet[Operation]:
    """Return the answered samples of these sessions that belong to no run."""
    is_answered = Q(sampling_session__isnull=False) & ~Q(state=Operation.State.QUEUED)
    return Operation.objects.filter(
        is_answered, sampling_session__run=None, sampling_session__session__in=clients, fixedsample=None
    )


def _delete(statement: str, pks: Iterable[int]) -> bool:
    """Delete rows that nothing refers to; not by way of their class, which would read what might hang on them."""
    with connection.cursor() as cursor:
        cursor.execute(statement, [sorted(pks)])
        return bool(cursor.rowcount)
