from __future__ import annotations

from datetime import timedelta

import pytest
from django.db.models.functions import Now

from runs.models import Operation, TrainingRun, User
from runs.services import claims, placement, workers
from runs.services.placement import Loads
from tests.services import rows
from tests.services.hand_worker import HandWorker

MODELS = [rows.BASE_MODEL]


@pytest.mark.parametrize(
    ("mine", "others", "num_free", "room", "surplus"),
    [
        (0, (), 5, 5, 0),
        (0, (0,), 8, 4, 0),
        (0, (0,), 9, 5, 0),
        (4, (0,), 4, 0, 0),
        (0, (4,), 4, 4, 0),
        (8, (0,), 0, 0, 4),
        (8, (0,), 1, 0, 0),
        (5, (4,), 0, 0, 0),
        (6, (4,), 0, 0, 1),
        (6, (6, 0), 0, 0, 3),
    ],
)
def test_shares(mine: int, others: tuple[int, ...], num_free: int, room: int, surplus: int) -> None:
    loads = Loads(mine=mine, others=others, num_free=num_free)
    assert (loads.room, loads.surplus) == (room, surplus)


def test_active_runs_of_live_workers_and_free_ones_are_counted(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    other = HandWorker()
    assert not placement.has_company(worker.row)  # it loads its models
    for row in (worker.row, other.row):
        workers.describe(row, device="cpu", dtype="float32", memory_bytes=1)
    assert placement.has_company(worker.row)
    assert placement.loads(worker.row, MODELS) == Loads(mine=0, others=(0,), num_free=1)
    assert placement.loads(worker.row, ["other/model"]).num_free == 0
    claims.claim_runs(other.row, MODELS)
    assert placement.loads(worker.row, MODELS) == Loads(mine=0, others=(1,), num_free=0)
    other.finish(Operation.objects.get(run=run, seq=0).pk)
    assert placement.loads(other.row, MODELS) == Loads(mine=1, others=(0,), num_free=0)
    TrainingRun.objects.filter(pk=run.pk).update(
        last_applied_at=Now() - timedelta(seconds=placement.ACTIVE_S + 1)
    )
    assert placement.loads(other.row, MODELS) == Loads(mine=0, others=(0,), num_free=0)


def test_a_claim_takes_no_more_than_its_limit_and_what_has_waited(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    second = rows.make_run(alice)
    assert claims.claim_runs(worker.row, MODELS, limit=0) == []
    assert claims.claim_runs(worker.row, MODELS, waited_s=placement.PATIENCE_S) == []
    assert [held.pk for held in claims.claim_runs(worker.row, MODELS, limit=1)] == [run.pk]
    waited = Now() - timedelta(seconds=placement.PATIENCE_S + 1)
    Operation.objects.filter(run=second).update(created_at=waited)
    found = claims.claim_runs(worker.row, MODELS, held=[run.pk], waited_s=placement.PATIENCE_S)
    assert [held.pk for held in found] == [second.pk]
