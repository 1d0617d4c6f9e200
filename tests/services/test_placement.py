from __future__ import annotations

from datetime import timedelta

import pytest
from django.db.models.functions import Now

from runs.exceptions import RequestInvalid
from runs.models import Operation, TrainingRun, User, Worker
from runs.services import base_models, claims, placement, sample_claims, workers
from runs.services.placement import Loads
from tests.services import rows
from tests.services.hand_worker import HandWorker

MODELS = [rows.BASE_MODEL]
OTHER_MODEL = "other/model"


def serve(worker: Worker, *base_models: str) -> None:
    fingerprints = {name: {"torch": "2"} for name in base_models}
    workers.describe(worker, device="cpu", dtype="float32", memory_bytes=1, fingerprints=fingerprints)


def loads_of(worker: HandWorker) -> Loads:
    return placement.loads(worker.row, rows.BASE_MODEL)


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
    assert not placement.look(worker.row, MODELS).has_company  # it loads its models
    for row in (worker.row, other.row):
        serve(row, *MODELS)
    assert placement.look(worker.row, MODELS).has_company
    assert placement.wanted([*MODELS, OTHER_MODEL]) == MODELS
    assert loads_of(worker) == Loads(mine=0, others=(0,), num_free=1)
    assert placement.loads(worker.row, OTHER_MODEL).num_free == 0
    claims.claim_runs(other.row, MODELS)
    assert placement.wanted(MODELS) == []
    assert loads_of(worker) == Loads(mine=0, others=(1,), num_free=0)
    other.finish(Operation.objects.get(run=run, seq=0).pk)
    assert loads_of(other) == Loads(mine=1, others=(0,), num_free=0)
    TrainingRun.objects.filter(pk=run.pk).update(
        last_applied_at=Now() - timedelta(seconds=placement.ACTIVE_S + 1)
    )
    assert loads_of(other) == Loads(mine=0, others=(0,), num_free=0)


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


def test_a_worker_that_could_not_load_the_base_model_is_no_company(
    run: TrainingRun, worker: HandWorker
) -> None:
    other = HandWorker()
    serve(worker.row, rows.BASE_MODEL)
    serve(other.row, OTHER_MODEL)
    worker.hold(run)
    assert not placement.look(worker.row, MODELS).has_company
    assert placement.look(worker.row, [*MODELS, OTHER_MODEL]).has_company
    assert loads_of(worker) == Loads(mine=1, others=(), num_free=0)


def test_a_worker_of_an_earlier_version_is_company_whatever_it_serves(
    run: TrainingRun, worker: HandWorker
) -> None:
    """It entered one fingerprint without the base model's name; an upgrade goes worker by worker."""
    serve(worker.row, rows.BASE_MODEL)
    earlier = HandWorker()
    Worker.objects.filter(pk=earlier.row.pk).update(fingerprint={"torch": "2", "device": "cpu"})
    assert placement.look(worker.row, MODELS).has_company
    earlier.hold(run)
    assert loads_of(worker) == Loads(mine=0, others=(1,), num_free=0)
    rows.make_run(run.owner)
    assert loads_of(worker) == Loads(mine=0, others=(1,), num_free=1)
    assert loads_of(worker).room == 1


def test_a_base_model_stays_on_offer_while_one_worker_serves_it(worker: HandWorker) -> None:
    serve(worker.row, rows.BASE_MODEL)
    failing = HandWorker().row
    rows.report_base_model(failing, error="no room")
    assert base_models.get(rows.BASE_MODEL).is_loaded
    workers.stop(worker.row)
    rows.report_base_model(failing, error="no room")
    with pytest.raises(RequestInvalid, match="no room"):
        base_models.get(rows.BASE_MODEL)


def test_a_drained_worker_takes_nothing_and_counts_for_nobody(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    other = HandWorker()
    for row in (worker.row, other.row):
        serve(row, *MODELS)
    worker.hold(run)
    waiting = rows.make_run(alice)
    pk = rows.sample(rows.make_sampling_session(alice), 0)
    workers.drain(worker.row)
    assert placement.look(worker.row, MODELS) == placement.Surroundings(has_company=True, is_drained=True)
    assert not placement.look(other.row, MODELS).has_company
    assert loads_of(other) == Loads(mine=0, others=(), num_free=1)
    assert claims.claim_runs(worker.row, MODELS, held=[run.pk]) == []
    assert sample_claims.take_samples(worker.row, MODELS, limit=9) == []
    assert [held.pk for held in claims.claim_runs(other.row, MODELS)] == [waiting.pk]
    assert [taken.pk for taken in sample_claims.take_samples(other.row, MODELS, limit=9)] == [pk]
    worker.release(run)
    assert [held.pk for held in claims.claim_runs(other.row, MODELS, held=[waiting.pk])] == [run.pk]

    workers.resume(worker.row)
    assert not placement.look(worker.row, MODELS).is_drained
    assert placement.look(other.row, MODELS).has_company
    third = rows.make_run(alice)
    assert [held.pk for held in claims.claim_runs(worker.row, MODELS)] == [third.pk]


@pytest.mark.parametrize("way", ["released", "stopped", "stopped over a late claim", "dead"])
def test_a_run_set_free_waits_for_who_has_room_whatever_the_age_of_its_work(
    run: TrainingRun, worker: HandWorker, way: str
) -> None:
    long_ago = Now() - timedelta(seconds=2 * placement.PATIENCE_S)
    Operation.objects.filter(run=run).update(created_at=long_ago)
    former = HandWorker()
    former.hold(run)
    if way == "released":
        former.release(run)
    elif way == "dead":
        Worker.objects.filter(pk=former.row.pk).update(lease_until=Now())
        assert former.row in workers.bury_dead(sparing=worker.row)
    else:
        workers.stop(former.row)
    if way == "stopped over a late claim":
        TrainingRun.objects.filter(pk=run.pk).update(worker=former.row, free_since=None)

    assert claims.claim_runs(worker.row, MODELS, waited_s=placement.PATIENCE_S) == []

    TrainingRun.objects.filter(pk=run.pk).update(free_since=long_ago)
    Worker.objects.filter(pk=former.row.pk).update(stopped_at=long_ago)
    assert len(claims.claim_runs(worker.row, MODELS, waited_s=placement.PATIENCE_S)) == 1
