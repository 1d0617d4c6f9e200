"""Why a run does not go on for now: told while it lasts, and gone with its cause or with whoever met it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db.models.functions import Now

from runs.exceptions import DiskFull
from runs.models import Operation, TrainingRun, User
from runs.services import holdups, operations, waiting, workers
from runs.services.operations import Submission
from runs.services.training_runs import DisplayState
from tests.no_room import no_room
from tests.services import rows
from tests.services.hand_worker import HandWorker
from tests.services.test_states import row_of, shown

LARGE = b"x" * 400_000
REASON = holdups.NO_ROOM_FOR_REQUEST


def send(run: TrainingRun, seq: int, payload: bytes = LARGE) -> int:
    run.refresh_from_db()
    kind = Operation.Kind.FORWARD_BACKWARD
    return operations.submit(run, Submission(kind=kind, seq=seq, payload=payload))


def test_a_run_whose_operation_finds_the_disk_full_says_so_until_there_is_room(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    worker.finish(Operation.objects.get(run=run, seq=0).pk)
    small = Operation.objects.get(pk=send(run, 2, b"{}"))  # has to wait for the large one
    with no_room(limit_bytes=65_536), pytest.raises(DiskFull):
        send(run, 1)
    assert not Operation.objects.filter(run=run, seq=1).exists()
    assert shown(alice, run) == DisplayState.HELD_UP
    assert (row_of(alice, run).status, row_of(alice, run).tone) == ("held up", "warn")
    assert waiting.reason_of(small) == REASON
    send(run, 1)
    assert shown(alice, run) == DisplayState.RUNNING
    assert waiting.reason_of(small) == ""
    run.refresh_from_db()
    assert (run.held_up, run.held_up_at) == ("", None)


def test_what_nobody_meets_again_is_not_told_for_long(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    worker.hold(run)
    holdups.enter(run.pk, REASON)
    assert holdups.reason_of(run) == REASON
    TrainingRun.objects.update(held_up_at=Now() - timedelta(seconds=holdups.SHOWN_S))
    assert holdups.reason_of(run) == ""
    assert shown(alice, run) == DisplayState.RUNNING
    holdups.enter(run.pk, REASON)
    assert shown(alice, run) == DisplayState.HELD_UP


def test_only_its_own_cause_clears_a_reason(run: TrainingRun, worker: HandWorker) -> None:
    reason = holdups.put_off("the checkpoint cannot be read: input/output error")
    holdups.enter(run.pk, reason)
    send(run, 1)
    holdups.clear(run.pk, REASON)
    assert holdups.reason_of(run) == reason
    holdups.clear(run.pk, reason)
    assert holdups.reason_of(run) == ""


def test_a_run_that_has_ended_is_not_held_up(alice: User, run: TrainingRun, worker: HandWorker) -> None:
    worker.hold(run)
    holdups.enter(run.pk, REASON)
    for state, expected in (("closed", DisplayState.CLOSED), ("failed", DisplayState.FAILED)):
        TrainingRun.objects.filter(pk=run.pk).update(state=state)
        assert shown(alice, run) == expected


def test_a_held_up_run_is_that_with_or_without_a_worker(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    worker.finish(Operation.objects.get(run=run, seq=0).pk)
    rows.make_recipe(run, state="running")
    assert shown(alice, run) == DisplayState.RUNNING
    holdups.enter(run.pk, holdups.NO_ROOM_FOR_STEP)
    assert shown(alice, run) == DisplayState.HELD_UP
    workers.stop(worker.row)
    assert shown(alice, run) == DisplayState.HELD_UP
