"""The operation log: one row for one request, whatever is sent how often and in which order."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from pytest_django.fixtures import DjangoCaptureOnCommitCallbacks, Settings

from runs import events
from runs.exceptions import RateLimited, RequestInvalid, SequenceConflict
from runs.models import Operation, TrainingRun, User
from runs.services import commits, operations
from runs.services.operations import MAX_QUEUED_PER_RUN, Submission
from tests.services import rows
from tests.services.hand_worker import HandWorker, applied, commit_of
from tests.services.races import race

STEP = Operation.Kind.OPTIM_STEP


def step(seq: int, payload: bytes = b"{}") -> Submission:
    return Submission(kind=STEP, seq=seq, payload=payload)


def test_a_submitted_operation_waits_with_its_payload(run: TrainingRun) -> None:
    pk = operations.submit(run, Submission(kind=STEP, seq=1, payload=b'{"a": 1}', num_tokens=7))
    row = Operation.objects.get(pk=pk)
    assert (row.state, row.kind, row.seq, row.num_tokens) == ("queued", "optim_step", 1, 7)
    assert operations.payload_of(row.payload, row.payload_file) == b'{"a": 1}'
    assert row.owner_id == run.owner_id
    assert (row.attempts, row.fence, row.result, row.finished_at) == (0, 0, None, None)


def test_a_retry_returns_the_first_row(run: TrainingRun) -> None:
    assert operations.submit(run, step(1)) == operations.submit(run, step(1))
    assert Operation.objects.filter(run=run, seq=1).count() == 1


def test_a_retry_after_the_answer_returns_the_first_row(run: TrainingRun, worker: HandWorker) -> None:
    first = operations.submit(run, step(1))
    worker.finish(first)
    run.refresh_from_db()
    assert operations.submit(run, step(1)) == first
    assert Operation.objects.get(pk=first).state == Operation.State.DONE


@pytest.mark.parametrize(
    "other",
    [step(1, b'{"b": 2}'), Submission(kind=Operation.Kind.SAVE_WEIGHTS, seq=1, payload=b"{}")],
    ids=["payload", "kind"],
)
def test_another_request_under_the_same_seq_is_refused(run: TrainingRun, other: Submission) -> None:
    first = operations.submit(run, step(1))
    with pytest.raises(SequenceConflict, match="seq_id 1: already holds another request") as refused:
        operations.submit(run, other)
    assert refused.value.http_status == 422
    row = Operation.objects.get(run=run, seq=1)
    assert (row.pk, bytes(row.payload or b""), row.kind) == (first, b"{}", "optim_step")


def test_fields_that_a_client_changes_on_retry_do_not_count(run: TrainingRun) -> None:
    first, second = (
        Submission(kind=STEP, seq=1, payload=payload, digest_of=b"same") for payload in (b"first", b"second")
    )
    assert operations.submit(run, first) == operations.submit(run, second)
    assert bytes(Operation.objects.get(run=run, seq=1).payload or b"") == b"first"


def test_the_doorbell_rings_after_the_commit(
    run: TrainingRun, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    """A worker that comes before it finds nothing, and nobody calls it again."""
    with django_capture_on_commit_callbacks() as rung:
        operations.submit(run, step(1))
    assert events._drain_doorbell.ring in rung


@pytest.mark.django_db(transaction=True)
def test_fifty_retries_at_once_make_one_row(run: TrainingRun) -> None:
    pks = race([partial(operations.submit, run, step(1))] * 50)
    assert len(set(pks)) == 1
    assert Operation.objects.filter(run=run, seq=1).count() == 1


@pytest.mark.django_db(transaction=True)
def test_of_two_requests_racing_for_a_seq_one_stands(run: TrainingRun) -> None:
    def submit(payload: bytes) -> int | str:
        try:
            return operations.submit(run, step(1, payload))
        except SequenceConflict as error:
            return str(error)

    answers = race([partial(submit, bytes([65 + index])) for index in range(8)])
    pks = [answer for answer in answers if isinstance(answer, int)]
    assert len(pks) == 1
    assert Operation.objects.get(run=run, seq=1).pk == pks[0]


def test_seqs_may_arrive_in_any_order(run: TrainingRun) -> None:
    for seq in (3, 1, 2):
        operations.submit(run, step(seq))
    assert list(
        Operation.objects.filter(run=run, seq__gt=0).order_by("pk").values_list("seq", flat=True)
    ) == [3, 1, 2]


def test_two_runs_have_seqs_of_their_own(alice: User, run: TrainingRun) -> None:
    other = rows.make_run(alice)
    assert operations.submit(run, step(1)) != operations.submit(other, step(1, b"{1}"))


def test_a_run_has_room_for_many_waiting_operations_but_not_for_all(run: TrainingRun) -> None:
    assert operations.submit(run, step(run.applied_seq + MAX_QUEUED_PER_RUN))
    with pytest.raises(RateLimited):
        operations.submit(run, step(run.applied_seq + MAX_QUEUED_PER_RUN + 1))


def test_a_refused_request_takes_up_its_seq(run: TrainingRun, worker: HandWorker) -> None:
    operations.reject(run, seq=1, kind=STEP, error=RequestInvalid("is too large", place="learning_rate"))
    row = Operation.objects.get(run=run, seq=1)
    assert (row.state, row.error_category, row.error) == ("failed", "user", "learning_rate: is too large")
    following = operations.submit(run, step(2))
    worker.finish(following)
    run.refresh_from_db()
    assert run.applied_seq == 2


def test_a_refusal_does_not_touch_an_operation_that_is_there(run: TrainingRun) -> None:
    first = operations.submit(run, step(1))
    operations.reject(run, seq=1, kind=STEP, error=RequestInvalid("late"))
    assert Operation.objects.get(run=run, seq=1).state == Operation.State.QUEUED
    assert operations.submit(run, step(1)) == first


def test_a_refused_request_cannot_open_an_endless_gap(run: TrainingRun) -> None:
    operations.reject(run, seq=10**12, kind=STEP, error=RequestInvalid("is bad"))
    assert operations.next_seq(run) == 1


def test_a_seq_given_up_as_missing_says_so(run: TrainingRun, worker: HandWorker) -> None:
    late = operations.submit(run, step(2))
    held = worker.hold(run)
    create = Operation.objects.get(run=run, seq=0)
    assert commits.commit_all(
        [commit_of(held, [applied(create.pk, 0), applied(None, 1), applied(late, 2)])]
    ) == [True]
    run.refresh_from_db()
    with pytest.raises(SequenceConflict, match="seq_id 1: was given up after 120 s"):
        operations.submit(run, step(1))


def test_a_large_payload_goes_to_storage_and_comes_back(run: TrainingRun, settings: Settings) -> None:
    inline, stored = b"i" * settings.INLINE_PAYLOAD_BYTES, b"s" * (settings.INLINE_PAYLOAD_BYTES + 1)
    first = Operation.objects.get(pk=operations.submit(run, step(1, inline)))
    second = Operation.objects.get(pk=operations.submit(run, step(2, stored)))
    assert (bytes(first.payload or b""), first.payload_file) == (inline, "")
    assert second.payload is None
    assert operations.payload_of(second.payload, second.payload_file) == stored
    path = Path(default_storage.path(second.payload_file))
    assert path.read_bytes() == stored
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert operations.submit(run, step(2, stored)) == second.pk


def test_the_latest_come_first_without_their_bytes(run: TrainingRun) -> None:
    for seq in (1, 2, 3):
        operations.submit(run, step(seq))
    latest = operations.latest_of(run, limit=2)
    assert [row.seq for row in latest] == [3, 2]
    assert {"payload", "result"} <= latest[0].get_deferred_fields()


def test_finished_among_leaves_out_what_waits(run: TrainingRun, worker: HandWorker) -> None:
    first, second = operations.submit(run, step(1)), operations.submit(run, step(2))
    worker.finish(first)
    assert operations.finished_among([first, second, 10**9]) == [first]


def test_samples_of_a_session_may_come_in_any_order_and_once(alice: User, worker: HandWorker) -> None:
    session = rows.make_sampling_session(alice)
    first = rows.sample(session, 3 * 10**9)
    assert rows.sample(session, 0) != first
    assert rows.sample(session, 3 * 10**9) == first
    with pytest.raises(SequenceConflict):
        operations.submit_sample(session, Submission(kind=Operation.Kind.SAMPLE, seq=0, payload=b"other"))
