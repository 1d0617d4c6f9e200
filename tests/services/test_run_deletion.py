"""Deleting a run: everything of it goes, nothing of others, and nobody brings it back."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.db import IntegrityError
from django.db.models.functions import Now
from pytest_django.fixtures import DjangoCaptureOnCommitCallbacks, Settings

from runs.exceptions import NotFound, RequestInvalid
from runs.models import (
    Checkpoint,
    Dataset,
    Evaluation,
    FixedSample,
    Metric,
    Operation,
    Recipe,
    RunEvent,
    SamplingSession,
    ServerClock,
    Session,
    Snapshot,
    TrainingRun,
    User,
    Worker,
)
from runs.services import (
    access,
    claims,
    commits,
    holdups,
    operations,
    run_deletion,
    sample_claims,
    sampling,
    sessions,
    workers,
)
from runs.services.operations import Submission
from tests.services import rows
from tests.services.flaky_bucket import use_flaky_bucket
from tests.services.hand_worker import HandWorker, applied, commit_of
from tests.services.races import race
from tests.services.test_payload_files import make_old


def finish_all(worker: HandWorker, run: TrainingRun) -> None:
    last = Operation.objects.filter(run=run, state="queued").order_by("seq").last()
    if last is not None:
        worker.finish(last.pk)
        worker.release(run)


def submit_large(run: TrainingRun, content: bytes) -> str:
    submission = Submission(
        kind=Operation.Kind.FORWARD_BACKWARD, seq=operations.next_seq(run), payload=content
    )
    pk = operations.submit(run, submission)
    return Operation.objects.get(pk=pk).payload_file


@pytest.fixture
def rested(run: TrainingRun, worker: HandWorker) -> TrainingRun:
    finish_all(worker, run)
    return run


def test_everything_of_the_run_goes(
    rested: TrainingRun, worker: HandWorker, alice: User, django_capture_on_commit_callbacks: object
) -> None:
    run, other = rested, rows.make_run(alice)
    checkpoint = rows.make_checkpoint(run)
    held = worker.hold(other)
    session = rows.make_sampling_session(alice, checkpoint)
    sampled = rows.sample(session, 0)
    rows.answer_sample(sampled)
    FixedSample.objects.create(run=run, step=1, prompt="Hello", operation_id=sampled)
    Evaluation.objects.create(run=run, step=1, first_seq=1, last_seq=2)
    Metric.objects.create(run=run, seq=1, name="loss", step=1, value=1.0)
    commits.add_event(run.pk, seq=1, step=1, kind="saved", detail={})
    recipe = rows.make_recipe(run, state="finished")
    snapshot = f"snapshots/{run.pk}/1-1-a"
    default_storage.save(f"{snapshot}/state", ContentFile(b"state"))
    run.refresh_from_db()
    commits.register_snapshot(run.pk, fence=run.fence, seq=1, directory=snapshot, size_bytes=5)

    with django_capture_on_commit_callbacks(execute=True):  # type: ignore[operator]
        run_deletion.delete(run)

    assert list(TrainingRun.objects.all()) == [other]
    assert not default_storage.exists(checkpoint.directory)
    assert not default_storage.exists(f"snapshots/{run.pk}")
    for model in (Checkpoint, Snapshot, Metric, RunEvent, Evaluation, FixedSample, Recipe, SamplingSession):
        assert not model.objects.exists(), model
    assert set(Operation.objects.values_list("run_id", flat=True)) == {other.pk}
    assert Dataset.objects.filter(pk=recipe.dataset_version.dataset_id).exists()
    assert held.pk == other.pk
    run_deletion.delete(run)  # once more is no error


def test_payload_files_go_that_nobody_else_names(
    rested: TrainingRun,
    worker: HandWorker,
    alice: User,
    settings: Settings,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    settings.INLINE_PAYLOAD_BYTES = 4
    other = rows.make_run(alice)
    shared, own, fresh = (submit_large(rested, content) for content in (b"shared", b"only here", b"just now"))
    assert submit_large(other, b"shared") == shared
    finish_all(worker, rested)
    shared_path, own_path = make_old(shared), make_old(own)
    with django_capture_on_commit_callbacks(execute=True):
        run_deletion.delete(rested)
    assert shared_path.exists()
    assert not own_path.exists()
    assert default_storage.exists(fresh)  # somebody may be storing the same bytes: housekeeping looks later


def test_a_bucket_that_fails_once_keeps_no_more_than_one_folder(
    rested: TrainingRun,
    settings: Settings,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    use_flaky_bucket(settings)
    checkpoints = [rows.make_checkpoint(rested, name) for name in ("one", "two")]
    with django_capture_on_commit_callbacks(execute=True):
        run_deletion.delete(rested)
    assert not TrainingRun.objects.filter(pk=rested.pk).exists()
    assert not any(default_storage.listdir(checkpoint.directory)[1] for checkpoint in checkpoints)


@pytest.mark.parametrize(
    ("state", "advice"),
    [
        ("preparing", "stop it first"),
        ("queued", "stop it first"),
        ("running", "stop it first"),
        ("paused", "stop it first"),
        ("stopping", "wait until it has ended"),
    ],
)
def test_a_run_that_trains_is_kept(rested: TrainingRun, state: str, advice: str) -> None:
    rows.make_recipe(rested, state=state)
    with pytest.raises(RequestInvalid, match=f"cannot delete a run that is {state}; {advice}"):
        run_deletion.delete(rested)
    assert TrainingRun.objects.filter(pk=rested.pk).exists()


def test_unfinished_operations_and_samples_keep_it(run: TrainingRun, worker: HandWorker, alice: User) -> None:
    with pytest.raises(RequestInvalid, match="1 unfinished operation; stop its client and wait"):
        run_deletion.delete(run)
    finish_all(worker, run)
    session = rows.make_sampling_session(alice, rows.make_checkpoint(run))
    pks = [rows.sample(session, seq) for seq in range(2)]
    with pytest.raises(RequestInvalid, match="2 unfinished operations"):
        run_deletion.delete(run)
    for pk in pks:
        rows.answer_sample(pk)
    run_deletion.delete(run)
    assert not TrainingRun.objects.exists()


def make_trained_without_code(run: TrainingRun, *, state: str) -> Recipe:
    TrainingRun.objects.filter(pk=run.pk).update(source=TrainingRun.Source.BROWSER)
    run.refresh_from_db()
    return rows.make_recipe(run, state=state)


@pytest.mark.parametrize("state", ["failed", "stopped", "discarded", "finished", "discarding"])
def test_what_nobody_waits_for_and_no_worker_has_does_not_keep_it(
    run: TrainingRun, worker: HandWorker, state: str
) -> None:
    make_trained_without_code(run, state=state)
    late = claims.claim_runs(
        worker.row, ["another/model"]
    )  # a worker that lives and does not have its base model
    run_deletion.delete(run)
    assert late == []
    assert claims.claim_runs(worker.row, [run.base_model]) == []
    assert not Operation.objects.exists()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("failed", "a run with 1 unfinished operation; wait for it"),
        ("discarding", "a run that is discarding; wait until it has ended"),
    ],
)
def test_a_run_that_a_live_worker_has_is_kept_until_that_ends(
    run: TrainingRun, worker: HandWorker, state: str, reason: str
) -> None:
    make_trained_without_code(run, state=state)
    held = worker.hold(run)
    with pytest.raises(RequestInvalid, match=f"cannot delete {reason}$"):
        run_deletion.delete(run)
    Worker.objects.filter(pk=worker.row.pk).update(
        lease_until=Now()
    )  # it hangs, and nobody has buried it yet
    run_deletion.delete(run)
    late = commit_of(held, [applied(None, 0)], from_seq=-1)
    assert commits.commit_all([late]) == [False]
    assert not Operation.objects.exists()


@pytest.mark.parametrize("state", ["stopping", "finishing"])
def test_a_run_whose_last_weights_no_worker_will_save_can_be_deleted(
    run: TrainingRun, worker: HandWorker, state: str
) -> None:
    make_trained_without_code(run, state=state)
    with pytest.raises(RequestInvalid, match=f"a run that is {state}; wait until it has ended"):
        run_deletion.delete(run)
    hour = timedelta(hours=1)
    for away in ({"rests_until": Now() + hour}, {"rests_until": None, "base_model": "another/model"}):
        TrainingRun.objects.filter(pk=run.pk).update(**away)
        run.refresh_from_db()
        assert run_deletion.obstacle_to_deletion(run, run.recipe) == ""
    TrainingRun.objects.filter(pk=run.pk).update(base_model=rows.BASE_MODEL)
    workers.drain(worker.row)
    run_deletion.delete(run)
    assert not TrainingRun.objects.exists()


def test_a_run_whose_last_weights_cannot_be_saved_just_now_can_be_deleted(rested: TrainingRun) -> None:
    make_trained_without_code(rested, state="stopping")
    with pytest.raises(RequestInvalid, match="a run that is stopping; wait until it has ended"):
        run_deletion.delete(rested)
    holdups.enter(rested.pk, "the disk is full")
    run_deletion.delete(rested)
    assert not TrainingRun.objects.exists()


@pytest.mark.parametrize("is_closed", [True, False])
def test_what_a_client_has_left_behind_does_not_keep_it(
    run: TrainingRun, worker: HandWorker, is_closed: bool
) -> None:
    workers.stop(worker.row)
    with pytest.raises(RequestInvalid, match="1 unfinished operation; stop its client, which counts as gone"):
        run_deletion.delete(run)
    if is_closed:
        sessions.finish(run.session, "error")
    else:
        ServerClock.objects.update_or_create(pk=1, defaults={"uptime_s": sessions.SILENT_S + 1})
    other = HandWorker()
    other.hold(run)
    with pytest.raises(RequestInvalid, match=r"1 unfinished operation; wait for it$"):
        run_deletion.delete(run)
    other.release(run)
    run_deletion.delete(run)
    assert not TrainingRun.objects.exists()


def test_samples_keep_it_while_a_client_waits_or_a_worker_draws_them(
    run: TrainingRun, worker: HandWorker, alice: User
) -> None:
    own = sampling.create_sampling_session(run.session, seq_id=0, base_model=rows.BASE_MODEL, checkpoint=None)
    clients = rows.make_sampling_session(alice, rows.make_checkpoint(run))
    make_trained_without_code(run, state="failed")
    pk, _ = rows.sample(own, 0), rows.sample(clients, 0)
    with pytest.raises(RequestInvalid, match="1 unfinished operation; stop its client and wait for it"):
        run_deletion.delete(run)
    sessions.finish(clients.session, "success")
    (taken,) = sample_claims.take_samples(worker.row, [rows.BASE_MODEL], limit=1)
    assert taken.pk == pk
    with pytest.raises(RequestInvalid, match="1 unfinished operation; wait for it"):
        run_deletion.delete(run)
    workers.stop(worker.row)
    run_deletion.delete(run)
    assert not Operation.objects.exists()


def test_another_persons_samples_do_not_keep_it_and_stay(rested: TrainingRun, alice: User, bob: User) -> None:
    checkpoint = rows.make_checkpoint(rested, is_public=True)
    session = rows.make_sampling_session(bob, checkpoint)
    pk = rows.sample(session, 0)
    run_deletion.delete(rested)
    (taken,) = sample_claims.take_samples(HandWorker().row, [rows.BASE_MODEL], limit=1)
    assert (taken.pk, taken.is_lost) == (pk, True)


def test_a_fork_keeps_where_it_came_from(rested: TrainingRun, alice: User) -> None:
    checkpoint = rows.make_checkpoint(rested)
    path = sampling.path_of(checkpoint)
    fork = rows.make_fork(checkpoint, alice)
    run_deletion.delete(rested)
    fork.refresh_from_db()
    assert (fork.parent, fork.parent_step, fork.parent_path) == (None, checkpoint.step, path)


def test_a_run_without_a_client_takes_its_session_along(rested: TrainingRun, alice: User) -> None:
    TrainingRun.objects.filter(pk=rested.pk).update(source=TrainingRun.Source.BROWSER)
    base = sampling.create_sampling_session(
        rested.session, seq_id=0, base_model=rows.BASE_MODEL, checkpoint=None
    )
    rows.answer_sample(rows.sample(base, 0))
    run_deletion.delete(rested)
    assert not Session.objects.filter(pk=rested.session_id).exists()
    assert not Operation.objects.exists()


def test_a_worker_that_holds_it_cannot_bring_it_back(rested: TrainingRun, worker: HandWorker) -> None:
    pk = rows.optim_step(rested, 1)
    held = worker.hold(rested)
    worker.finish(pk)
    run_deletion.delete(rested)

    late = commit_of(held, [applied(pk, 2)], from_seq=1)
    assert commits.commit_all([late]) == [False]
    folder = f"snapshots/{held.pk}/late"
    kept = commits.register_snapshot(held.pk, fence=held.fence, seq=2, directory=folder, size_bytes=1)
    assert kept == [folder]  # to be deleted
    claims.enter_replay(held, num_replayed=1, num_to_replay=2)
    claims.release_run(held.pk, worker.row, fence=held.fence)
    assert claims.missing_among([held.pk]) == {held.pk}
    assert not TrainingRun.objects.exists()
    assert not Operation.objects.exists()
    with pytest.raises(NotFound):
        access.get_run(rested.owner, rested.public_id)


@pytest.mark.django_db(transaction=True)
def test_whoever_comes_first_an_operation_is_never_lost(alice: User, worker: HandWorker) -> None:
    for _ in range(8):
        run = rows.make_run(alice)
        finish_all(worker, run)

        def submit(run: TrainingRun = run) -> str:
            try:
                rows.optim_step(run, 1)
            except IntegrityError:
                return "refused"
            return "taken"

        def remove(run: TrainingRun = run) -> str:
            try:
                run_deletion.delete(run)
            except RequestInvalid:
                return "kept"
            return "deleted"

        outcome = race([submit, remove])
        assert outcome in (["taken", "kept"], ["refused", "deleted"])
        assert Operation.objects.filter(run_id=run.pk).exists() == (outcome[0] == "taken")


@pytest.mark.django_db(transaction=True)
def test_whoever_comes_first_a_worker_has_the_run_or_it_is_gone(alice: User, worker: HandWorker) -> None:
    held: list[int] = []
    for _ in range(8):
        run = rows.make_run(alice)
        make_trained_without_code(run, state="failed")

        def claim(run: TrainingRun = run) -> str:
            found = claims.claim_runs(worker.row, [run.base_model], held=held)
            held.extend(one.pk for one in found)
            return "claimed" if found else "nothing"

        def remove(run: TrainingRun = run) -> str:
            try:
                run_deletion.delete(run)
            except RequestInvalid:
                return "kept"
            return "deleted"

        outcome = race([claim, remove])
        assert outcome in (["claimed", "kept"], ["nothing", "deleted"])
        assert Operation.objects.filter(run_id=run.pk).exists() == (outcome[1] == "kept")


@pytest.mark.django_db(transaction=True)
def test_deleted_twice_at_once_it_is_gone_once(alice: User, worker: HandWorker) -> None:
    run = rows.make_run(alice)
    finish_all(worker, run)
    race([partial(run_deletion.delete, run)] * 4)
    assert not TrainingRun.objects.filter(pk=run.pk).exists()
