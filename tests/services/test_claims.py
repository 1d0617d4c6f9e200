"""Claims: each run has one owner, a new owner has a higher fence, operations are taken in order."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import pytest
from django.db.models.functions import Now
from pytest_django.fixtures import Settings

from runs.exceptions import RequestInvalid
from runs.models import Checkpoint, Operation, TrainingRun, User, Worker
from runs.services import claims, commits, operations, playground, sample_claims, workers
from runs.services.sample_claims import TakenSample
from tests.services import rows
from tests.services.hand_worker import HandWorker, applied, commit_of
from tests.services.races import race

MODELS = [rows.BASE_MODEL]


def test_a_claim_raises_the_fence_and_names_the_owner(run: TrainingRun, worker: HandWorker) -> None:
    (held,) = claims.claim_runs(worker.row, MODELS)
    run.refresh_from_db()
    assert (held.pk, held.fence, held.applied_seq) == (run.pk, 1, -1)
    assert (run.fence, run.worker_id) == (1, worker.row.pk)
    assert (held.lora_rank, held.lora_seed, held.public_id) == (run.lora_rank, run.lora_seed, run.public_id)


def test_each_new_claim_raises_the_fence_again(run: TrainingRun, worker: HandWorker) -> None:
    for fence in (1, 2, 3):
        (held,) = claims.claim_runs(worker.row, MODELS)
        assert held.fence == fence
        worker.release(run)


def test_only_free_runs_with_work_for_the_workers_models_are_claimed(
    run: TrainingRun, worker: HandWorker
) -> None:
    assert claims.claim_runs(worker.row, ["other/model"]) == []
    worker.finish(Operation.objects.get(run=run, seq=0).pk)
    assert claims.claim_runs(HandWorker().row, MODELS) == []  # it has an owner
    worker.release(run)
    assert claims.claim_runs(worker.row, MODELS) == []  # it has no work
    rows.optim_step(run, 1)
    assert [held.pk for held in claims.claim_runs(worker.row, MODELS)] == [run.pk]


def test_a_worker_claims_again_what_it_knows_nothing_of(run: TrainingRun, worker: HandWorker) -> None:
    claims.claim_runs(worker.row, MODELS)  # and the answer is lost
    assert claims.claim_runs(worker.row, MODELS, held=[run.pk]) == []
    (again,) = claims.claim_runs(worker.row, MODELS)
    assert again.fence == 2
    worker.row.refresh_from_db()
    workers.stop(worker.row)
    assert claims.claim_runs(worker.row, MODELS) == []  # a buried worker claims nothing


def test_a_late_release_does_not_free_a_run_that_was_claimed_again(
    run: TrainingRun, worker: HandWorker
) -> None:
    (first,) = claims.claim_runs(worker.row, MODELS)
    claims.claim_runs(worker.row, MODELS)
    claims.release_run(run.pk, worker.row, fence=first.fence)
    run.refresh_from_db()
    assert run.worker_id == worker.row.pk


def test_only_the_owner_can_release(run: TrainingRun, worker: HandWorker) -> None:
    worker.hold(run)
    HandWorker().release(run)
    run.refresh_from_db()
    assert run.worker_id == worker.row.pk


@pytest.mark.django_db(transaction=True)
def test_racing_workers_claim_each_run_once(alice: User, worker: HandWorker) -> None:
    made = {rows.make_run(alice).pk for _ in range(24)}
    rivals = [HandWorker().row for _ in range(4)]
    claimed = race([partial(claims.claim_runs, rival, MODELS) for rival in rivals])
    pks = [held.pk for part in claimed for held in part]
    assert sorted(pks) == sorted(made)
    assert set(TrainingRun.objects.values_list("fence", flat=True)) == {1}


def test_a_run_of_a_dead_worker_is_free_even_if_nobody_set_it_free(
    run: TrainingRun, worker: HandWorker
) -> None:
    """A claim and the burial of its worker may cross."""
    zombie = HandWorker()
    assert zombie.hold(run).fence == 1
    Worker.objects.filter(pk=zombie.row.pk).update(stopped_at=Now())
    assert worker.hold(run).fence == 2
    assert claims.claim_runs(zombie.row, MODELS) == []


def test_a_buried_worker_claims_nothing(run: TrainingRun) -> None:
    """It would keep what it takes: it was buried once and is not looked at again."""
    zombie = HandWorker()
    Worker.objects.filter(pk=zombie.row.pk).update(stopped_at=Now())
    assert claims.claim_runs(zombie.row, MODELS) == []
    assert len(claims.claim_runs(HandWorker().row, MODELS)) == 1


def test_operations_are_taken_in_seq_order_after_the_last_taken(run: TrainingRun, worker: HandWorker) -> None:
    for seq in (4, 2, 1, 3):
        rows.optim_step(run, seq)
    worker.hold(run)
    taken = claims.take_operations(worker.row, {run.pk: -1}, limit=3)
    assert [op.seq for op in taken] == [0, 1, 2]
    assert [op.seq for op in claims.take_operations(worker.row, {run.pk: 2}, limit=9)] == [3, 4]
    assert claims.take_operations(worker.row, {}, limit=9) == []


def test_operations_of_several_runs_are_grouped_by_run(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    other = rows.make_run(alice)
    for seq in (1, 2, 3):
        rows.optim_step(run, seq)
        rows.optim_step(other, seq)
    taken = claims.take_operations(worker.row, {other.pk: 0, run.pk: 1}, limit=2)
    assert [(op.run_pk, op.seq) for op in taken] == [(run.pk, 2), (run.pk, 3), (other.pk, 1), (other.pk, 2)]


def test_tokens_are_shared_by_the_first_operations_of_all_runs(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    """A worker that takes many runs back does not read all that waits of them."""
    runs = [run, rows.make_run(alice), rows.make_run(alice)]
    for one in runs:
        for seq in (1, 2, 3):
            waiting = operations.Submission(
                kind=Operation.Kind.FORWARD, seq=seq, payload=b"x", num_tokens=10 * seq
            )
            operations.submit(one, waiting)

    def take(max_tokens: int, waiting: Mapping[int, int] = MappingProxyType({})) -> list[int]:
        taken = claims.take_operations(
            worker.row, {one.pk: 0 for one in runs}, limit=9, max_tokens=max_tokens, waiting=waiting
        )
        return [sum(op.run_pk == one.pk for op in taken) for one in runs]

    assert take(0) == [1, 1, 1]  # nobody waits for others to begin
    assert take(30) == [1, 1, 1]
    assert take(31) == [2, 1, 1]
    assert take(90) == [2, 2, 2]
    assert take(10**6) == [3, 3, 3]
    # Who has something to do already gets more when there is room, whoever has least of it first.
    assert take(0, {runs[0].pk: 5}) == [0, 1, 1]
    assert take(21, {runs[0].pk: 5}) == [1, 1, 1]
    assert take(31, {runs[0].pk: 25}) == [0, 2, 1]
    assert take(61, {runs[0].pk: 25}) == [1, 2, 2]


def test_each_worker_that_takes_it_counts_an_attempt_and_notes_the_start(
    run: TrainingRun, worker: HandWorker
) -> None:
    taking = [HandWorker().row, HandWorker().row, worker.row]
    for attempts, row in enumerate(taking, start=1):
        for _ in range(2):  # again by the same worker, as behind a gap, is no further attempt
            (taken,) = claims.take_operations(row, {run.pk: -1}, limit=1)
            assert (taken.attempts, taken.lone_attempts) == (attempts, 0)
    claims.count_lone_attempt(taken.pk)
    counted = Operation.objects.get(pk=taken.pk)
    assert (counted.attempts, counted.lone_attempts, counted.worker_id) == (3, 1, worker.row.pk)
    assert counted.started_at is not None
    assert taken.waited_s >= 0


@pytest.mark.parametrize(("is_lost", "expected"), [(False, (0, 0)), (True, (1, 2))])
def test_what_is_let_go_in_order_has_had_no_attempt_alone_either(
    run: TrainingRun, worker: HandWorker, is_lost: bool, expected: tuple[int, int]
) -> None:
    fence = worker.hold(run).fence
    (taken,) = claims.take_operations(worker.row, {run.pk: -1}, limit=1)
    for _ in range(2):  # as one does that waits for a storage that is away
        claims.count_lone_attempt(taken.pk)
    claims.release_run(run.pk, worker.row, fence=fence, is_lost=is_lost)
    left = Operation.objects.get(pk=taken.pk)
    assert (left.attempts, left.lone_attempts) == expected


def test_a_run_that_is_let_go_in_order_leaves_no_attempts_behind(
    run: TrainingRun, worker: HandWorker
) -> None:
    rows.optim_step(run, 1)
    for is_lost, attempts in [(False, 0), (False, 0), (True, 1), (False, 1)]:
        holder = HandWorker()
        held = holder.hold(run)
        taken = claims.take_operations(holder.row, {run.pk: -1}, limit=9)
        assert [op.attempts for op in taken] == [attempts + (not is_lost)] * 2
        claims.release_run(run.pk, holder.row, fence=held.fence, is_lost=is_lost)
        claims.release_run(run.pk, holder.row, fence=held.fence, is_lost=is_lost)  # the answer was lost
        assert set(run.operations.values_list("attempts", flat=True)) == {attempts}


def test_a_refused_operation_is_taken_only_to_pass_its_seq(run: TrainingRun, worker: HandWorker) -> None:
    operations.reject(run, seq=1, kind=Operation.Kind.OPTIM_STEP, error=RequestInvalid("no"))
    rows.optim_step(run, 2)
    taken = claims.take_operations(worker.row, {run.pk: 0}, limit=9)
    assert [(op.seq, op.is_rejected) for op in taken] == [(1, True), (2, False)]


def test_a_payload_in_storage_is_taken_whole(
    run: TrainingRun, worker: HandWorker, settings: Settings
) -> None:
    payload = b"x" * (settings.INLINE_PAYLOAD_BYTES + 1)
    operations.submit(
        run, operations.Submission(kind=Operation.Kind.FORWARD, seq=1, payload=payload, num_tokens=5)
    )
    (taken,) = claims.take_operations(worker.row, {run.pk: 0}, limit=1)
    assert (taken.payload, taken.num_tokens, taken.kind) == (payload, 5, "forward")


def test_samples_are_taken_once_and_oldest_first(alice: User, worker: HandWorker) -> None:
    session = rows.make_sampling_session(alice)
    pks = [rows.sample(session, seq) for seq in (5, 1, 9)]
    assert [taken.pk for taken in sample_claims.take_samples(worker.row, MODELS, limit=2)] == pks[:2]
    assert [
        taken.pk for taken in sample_claims.take_samples(worker.row, MODELS, limit=9, held=pks[:2])
    ] == pks[2:]
    assert sample_claims.take_samples(HandWorker().row, MODELS, limit=9) == []
    assert sample_claims.take_samples(worker.row, ["other/model"], limit=9) == []


def test_owners_take_turns_with_their_samples(alice: User, worker: HandWorker) -> None:
    many, other = rows.make_sampling_session(alice), rows.make_sampling_session(alice)
    flood = [rows.sample(session, seq) for seq in range(5) for session in (many, other)]
    few = rows.make_sampling_session(rows.make_user("bob"))
    first, second = (rows.sample(few, seq) for seq in range(2))

    taken = [sample.pk for sample in sample_claims.take_samples(worker.row, MODELS, limit=5)]

    assert taken == [flood[0], first, flood[1], second, flood[2]]
    rest = sample_claims.take_samples(worker.row, MODELS, limit=99, held=taken)
    assert [sample.pk for sample in rest] == flood[3:]


def test_owners_take_turns_also_where_one_sample_is_taken_at_a_time(alice: User, worker: HandWorker) -> None:
    many = rows.make_sampling_session(alice)
    flood = [rows.sample(many, seq) for seq in range(4)]
    few = rows.make_sampling_session(rows.make_user("bob"))
    first = rows.sample(few, 0)

    taken: list[TakenSample] = []
    for _ in range(3):
        taken += sample_claims.take_samples(
            worker.row,
            MODELS,
            limit=1,
            held=[sample.pk for sample in taken],
            held_owners=[sample.owner_pk for sample in taken],
        )

    assert [sample.pk for sample in taken] == [flood[0], first, flood[1]]


def test_people_are_told_how_many_samples_are_before_theirs(alice: User, worker: HandWorker) -> None:
    rows.report_base_model(worker.row)
    flooded = rows.make_sampling_session(alice)
    for seq in range(5):
        rows.sample(flooded, seq)
    bob = rows.make_user("bob")
    pk = rows.sample(rows.make_sampling_session(bob), 0)
    assert playground.waiting_words(bob, pk) == "waiting: 1 sample is before this one"
    sample_claims.take_samples(HandWorker().row, MODELS, limit=1)
    last = rows.sample(flooded, 5)
    assert playground.waiting_words(alice, last) == "waiting: 6 samples are before this one"


def test_samples_of_a_dead_worker_are_taken_again(alice: User, worker: HandWorker) -> None:
    pk = rows.sample(rows.make_sampling_session(alice), 0)
    sample_claims.take_samples(worker.row, MODELS, limit=9)
    workers.stop(worker.row)
    (again,) = sample_claims.take_samples(HandWorker().row, MODELS, limit=9)
    assert (again.pk, again.attempts) == (pk, 2)


@pytest.mark.django_db(transaction=True)
def test_racing_workers_take_each_sample_once(alice: User, worker: HandWorker) -> None:
    session = rows.make_sampling_session(alice)
    made = [rows.sample(session, seq) for seq in range(40)]
    rivals = [HandWorker().row for _ in range(4)]
    taken = race([partial(sample_claims.take_samples, rival, MODELS, limit=20) for rival in rivals])
    first = [sample.pk for part in taken for sample in part]
    rest = [sample.pk for sample in sample_claims.take_samples(worker.row, MODELS, limit=99)]
    assert sorted(first + rest) == made


def test_a_sample_knows_where_its_weights_are(alice: User, run: TrainingRun, worker: HandWorker) -> None:
    checkpoint = rows.make_checkpoint(run, kind=Checkpoint.Kind.SAMPLER)
    rows.sample(rows.make_sampling_session(alice, checkpoint), 0)
    rows.sample(rows.make_sampling_session(alice), 0)
    of_checkpoint, of_base = sample_claims.take_samples(worker.row, MODELS, limit=9)
    assert (of_checkpoint.checkpoint_directory, of_checkpoint.is_lost) == (checkpoint.directory, False)
    assert (of_base.checkpoint_directory, of_base.is_lost) == ("", False)


def test_a_sample_of_deleted_weights_is_marked_lost(
    alice: User, run: TrainingRun, worker: HandWorker
) -> None:
    checkpoint = rows.make_checkpoint(run, kind=Checkpoint.Kind.SAMPLER)
    rows.sample(rows.make_sampling_session(alice, checkpoint), 0)
    checkpoint.delete()
    (taken,) = sample_claims.take_samples(worker.row, MODELS, limit=9)
    assert taken.is_lost


def test_applied_operations_come_back_for_replay_without_an_attempt(
    run: TrainingRun, worker: HandWorker
) -> None:
    operations.reject(run, seq=1, kind=Operation.Kind.OPTIM_STEP, error=RequestInvalid("no"))
    pk = rows.optim_step(run, 2)
    rows.optim_step(run, 3)
    worker.finish(pk, commits.Result(body=b"answer"))
    replayed = list(claims.applied_operations(run.pk, after_seq=0, up_to_seq=2))
    assert [(op.seq, op.is_rejected, op.result, op.attempts) for op in replayed] == [
        (1, True, None, 0),
        (2, False, b"answer", 0),
    ]
    assert Operation.objects.get(pk=pk).attempts == 0


def test_snapshots_are_offered_newest_first_up_to_what_was_applied(run: TrainingRun) -> None:
    for seq, fence in ((10, 1), (20, 1), (20, 2)):
        TrainingRun.objects.filter(pk=run.pk).update(fence=fence)
        commits.register_snapshot(
            run.pk, fence=fence, seq=seq, directory=f"snapshots/1/{seq}-{fence}", size_bytes=1
        )
    assert claims.latest_snapshots(run.pk, up_to_seq=25) == [
        (20, "snapshots/1/20-2"),
        (20, "snapshots/1/20-1"),
    ]
    assert claims.latest_snapshots(run.pk, up_to_seq=15) == []


def test_checkpoint_exists_asks_for_kind_and_name(run: TrainingRun) -> None:
    rows.make_checkpoint(run, "one")
    assert claims.checkpoint_exists(run.pk, kind="weights", name="one")
    assert not claims.checkpoint_exists(run.pk, kind="sampler_weights", name="one")
    assert not claims.checkpoint_exists(run.pk, kind="weights", name="two")


def test_a_skipped_seq_becomes_a_row_when_it_is_passed(run: TrainingRun, worker: HandWorker) -> None:
    late = rows.optim_step(run, 3)
    held = worker.hold(run)
    create = Operation.objects.get(run=run, seq=0)
    cycle = [applied(create.pk, 0), applied(None, 1), applied(None, 2), applied(late, 3)]
    assert commits.commit_all([commit_of(held, cycle)]) == [True]
    found = list(
        Operation.objects.filter(run=run, seq__in=(1, 2)).values_list("kind", "state", "error_category")
    )
    assert found == [("skipped", "failed", "user")] * 2
