"""Runs: made once per number, told why they wait; and the base models and sessions they are made from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from django.db import connection

from runs.exceptions import NotFound, RateLimited, RequestInvalid, SequenceConflict, SessionFinished
from runs.models import Operation, SamplingSession, Session, TrainingRun, User
from runs.services import (
    access,
    base_models,
    claims,
    commits,
    operations,
    sampling,
    sessions,
    training_runs,
    waiting,
    workers,
)
from runs.services.training_runs import DisplayState, Lora, Start
from tests.pages import seed
from tests.services import rows
from tests.services.hand_worker import HandWorker
from tests.services.races import race


def create(session: Session, **changes: object) -> tuple[TrainingRun, int]:
    fields = {"model_seq_id": 0, "base_model": rows.BASE_MODEL, "lora": Lora(rank=8)} | changes
    return training_runs.create_run(session, **fields)  # type: ignore[arg-type]


@pytest.fixture
def session(alice: User, worker: HandWorker) -> Session:
    return sessions.create_session(alice)


def test_a_run_is_made_with_its_first_operation(session: Session) -> None:
    run, pk = create(session, lora=Lora(rank=4, seed=7, train_unembed=False), user_metadata={"a": "b"})
    assert run.public_id == f"{session.public_id}:train:0"
    assert (run.lora_rank, run.lora_seed, run.train_unembed, run.user_metadata) == (4, 7, False, {"a": "b"})
    operation = Operation.objects.get(pk=pk)
    assert (operation.run, operation.seq, operation.kind, operation.state) == (
        run,
        0,
        "create_model",
        "queued",
    )


def test_a_retry_returns_the_first_run(session: Session) -> None:
    first, pk = create(session)
    again, same_pk = create(session)
    assert (again, same_pk) == (first, pk)
    assert again.lora_seed == first.lora_seed


@pytest.mark.django_db(transaction=True)
def test_retries_at_once_make_one_run(session: Session) -> None:
    made = race([partial(create, session)] * 8)
    assert len({(run.pk, pk) for run, pk in made}) == 1
    assert TrainingRun.objects.filter(session=session).count() == 1


def test_another_run_under_the_same_number_is_refused(session: Session) -> None:
    create(session)
    with pytest.raises(RequestInvalid, match="model_seq_id: 0 already names a run"):
        create(session, lora=Lora(rank=4))
    run = TrainingRun.objects.get(session=session)
    assert run.lora_rank == 8
    start = Start(checkpoint=rows.make_checkpoint(run), with_optimizer=True)
    with pytest.raises(SequenceConflict):
        create(session, start=start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"base_model": "no/model"},
            "base_model: unknown base model 'no/model'; this server offers 'mintweb/tiny'",
        ),
        ({"lora": Lora(rank=rows.MAX_RANK + 1)}, "lora_config.rank: 65 is above 64"),
        ({"model_seq_id": 2**31}, "model_seq_id: must be at most 2147483647"),
    ],
)
def test_what_cannot_be_served_is_refused(session: Session, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestInvalid, match=message):
        create(session, **changes)
    assert not TrainingRun.objects.filter(session=session).exists()


def test_a_base_model_that_could_not_be_loaded_is_refused_in_words(
    session: Session, worker: HandWorker
) -> None:
    rows.report_base_model(worker.row, error="no such file")
    with pytest.raises(RequestInvalid, match="could not be loaded: no such file"):
        create(session)
    rows.report_base_model(worker.row)
    assert create(session)


def test_a_reported_base_model_is_known_with_its_sizes(worker: HandWorker) -> None:
    info = base_models.get(rows.BASE_MODEL)
    assert info.is_loaded
    assert (info.vocab_size, info.max_context, info.max_rank) == (2048, 2048, 64)
    assert base_models.find("no/model") is None


def test_without_a_worker_the_reason_says_so(run: TrainingRun, worker: HandWorker) -> None:
    operation = Operation.objects.get(run=run, seq=0)
    assert waiting.reason_of(operation) == ""
    workers.stop(worker.row)
    assert "no GPU worker is running" in waiting.reason_of(operation)


def test_a_gap_is_named_in_the_reason(run: TrainingRun, worker: HandWorker) -> None:
    pks = {seq: rows.optim_step(run, seq) for seq in (1, 2, 4)}
    reasons = {seq: waiting.reason_of(Operation.objects.get(pk=pk)) for seq, pk in pks.items()}
    assert reasons[1] == reasons[2] == ""
    assert reasons[4].startswith("waiting for seq_id 3, which has not arrived; it is given up 120 s after")
    rows.optim_step(run, 3)
    assert waiting.reason_of(Operation.objects.get(pk=pks[4])) == ""


def test_a_gap_is_counted_from_what_was_applied(run: TrainingRun, worker: HandWorker) -> None:
    worker.finish(rows.optim_step(run, 1))
    late = rows.optim_step(run, 3)
    assert "seq_id 2" in waiting.reason_of(Operation.objects.get(pk=late))


def test_a_sample_waits_for_its_turn_only(alice: User, worker: HandWorker) -> None:
    pk = rows.sample(rows.make_sampling_session(alice), 0)
    assert waiting.reason_of(Operation.objects.get(pk=pk)) == ""


def test_what_a_person_sees_follows_the_rows(alice: User, run: TrainingRun, worker: HandWorker) -> None:
    def state() -> DisplayState:
        found = training_runs.with_activity(access.runs_of(alice)).get(pk=run.pk)
        shown = training_runs.display_state(found)
        with_state = training_runs.in_display_state(training_runs.with_activity(access.runs_of(alice)), shown)
        assert list(with_state) == [run]
        return shown

    assert state() == DisplayState.QUEUED
    held = worker.hold(run)
    assert state() == DisplayState.RUNNING
    claims.enter_replay(held, num_replayed=14, num_to_replay=40)
    assert state() == DisplayState.RECOVERING
    reason = waiting.reason_of(Operation.objects.get(run=run, seq=0))
    assert reason == "recovering: replaying 14 of 40 operations; nothing is lost"
    claims.enter_replay(held, num_replayed=0, num_to_replay=0)
    worker.finish(Operation.objects.get(run=run, seq=0).pk)
    assert state() == DisplayState.RUNNING
    TrainingRun.objects.filter(pk=run.pk).update(last_applied_at=None)
    assert state() == DisplayState.WAITING_FOR_CLIENT
    rows.optim_step(run, 1)
    workers.stop(worker.row)
    assert state() == DisplayState.WAITING_FOR_WORKER
    TrainingRun.objects.filter(pk=run.pk).update(state=TrainingRun.State.CLOSED)
    assert state() == DisplayState.CLOSED
    TrainingRun.objects.filter(pk=run.pk).update(state=TrainingRun.State.FAILED)
    assert state() == DisplayState.FAILED


@pytest.mark.parametrize(
    ("of_recipe", "shown"),
    [
        ("preparing", DisplayState.PREPARING),
        ("queued", DisplayState.QUEUED),
        ("running", DisplayState.RUNNING),
        ("paused", DisplayState.PAUSED),
        ("finishing", DisplayState.RUNNING),
        ("stopping", DisplayState.STOPPING),
        ("discarding", DisplayState.STOPPING),
        ("finished", DisplayState.CLOSED),
        ("stopped", DisplayState.STOPPED),
        ("discarded", DisplayState.STOPPED),
        ("failed", DisplayState.FAILED),
    ],
)
def test_a_run_without_a_client_has_the_state_of_its_recipe(
    alice: User, run: TrainingRun, worker: HandWorker, of_recipe: str, shown: DisplayState
) -> None:
    worker.hold(run)
    worker.finish(Operation.objects.get(run=run, seq=0).pk)
    TrainingRun.objects.filter(pk=run.pk).update(last_applied_at=None)
    rows.make_recipe(run, state=of_recipe)

    listed = training_runs.with_activity(access.runs_of(alice))
    assert training_runs.display_state(listed.get()) == shown
    in_states = [state for state in DisplayState if training_runs.in_display_state(listed, state).exists()]
    assert in_states == [shown]


def test_a_name_is_cut_to_what_is_kept(run: TrainingRun) -> None:
    training_runs.rename(run, "n" * 300)
    run.refresh_from_db()
    assert run.name == "n" * 200


def test_the_last_request_is_the_latest_operation(run: TrainingRun) -> None:
    pk = rows.optim_step(run, 1)
    assert training_runs.latest_of([run])[run.pk].asked_at == Operation.objects.get(pk=pk).created_at


def test_only_the_owner_reaches_a_row(alice: User, bob: User, run: TrainingRun) -> None:
    session = rows.make_sampling_session(alice)
    operation = Operation.objects.get(run=run, seq=0)
    gets = [
        (access.get_run, run.public_id),
        (access.get_session, run.session.public_id),
        (access.get_open_session, run.session.public_id),
        (access.get_sampling_session, session.public_id),
        (access.get_operation, operation.pk),
    ]
    for get, key in gets:
        assert get(alice, key)  # type: ignore[operator]
        with pytest.raises(NotFound):
            get(bob, key)  # type: ignore[operator]
    for listing in (access.runs_of(bob), access.sessions_of(bob), access.keys_of(bob)):
        assert not listing.exists()


def test_a_finished_session_keeps_its_first_reason_and_takes_no_new_work(alice: User) -> None:
    session = sessions.create_session(alice, sdk_version="9" * 100)
    sessions.finish(session, "success")
    sessions.finish(session, "errored")
    session.refresh_from_db()
    assert (session.finish_reason, session.sdk_version) == ("success", "9" * 40)
    with pytest.raises(SessionFinished):
        access.get_open_session(alice, session.public_id)
    assert access.get_session(alice, session.public_id) == session


def test_sessions_that_made_nothing_are_not_listed(alice: User, run: TrainingRun) -> None:
    sessions.create_session(alice)
    assert list(access.sessions_of(alice)) == [run.session]


def test_sessions_are_listed_without_a_look_at_each_pair_of_what_they_made(
    alice: User, run: TrainingRun
) -> None:
    session, number = run.session, 40
    for _ in range(number):
        seed.make_run(alice, session=session)
    SamplingSession.objects.bulk_create(
        SamplingSession(public_id=f"s{n}", owner=alice, session=session, seq_id=n) for n in range(number)
    )
    assert list(access.sessions_of(alice)) == [session]
    (plan,) = json.loads(access.sessions_of(alice).explain(analyze=True, format="json"))
    assert max(num_rows(plan["Plan"])) <= 2 * number


def test_runs_are_listed_without_a_look_at_all_their_samples(alice: User, worker: HandWorker) -> None:
    number = 40
    runs = [seed.make_run(alice) for _ in range(number)]
    SamplingSession.objects.bulk_create(
        SamplingSession(public_id=f"s{run.pk}", owner=alice, session=run.session, seq_id=0, run=run)
        for run in runs
    )
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO runs_operation (owner_id, sampling_session_id, sampled_run_pk, seq, kind, state, payload_file,"
            " payload_digest, num_tokens, result_is_proto, error, error_category, fence, attempts, lone_attempts,"
            " finished_at) SELECT owner_id, id, run_id, n, 'sample', CASE WHEN n < 9 THEN 'queued' ELSE 'done' END, '',"
            " '', 0, false, '', '', 0, 0, 0, CASE WHEN n >= 9 THEN now() - n * interval '1 s' END"
            " FROM runs_samplingsession, generate_series(1, 500) n WHERE owner_id = %s",
            [alice.pk],
        )
        cursor.execute("ANALYZE runs_operation, runs_trainingrun, runs_samplingsession")
    listed = training_runs.with_activity(access.runs_of(alice))
    assert {training_runs.display_state(one) for one in listed} == {DisplayState.RUNNING}
    for shown in (listed, training_runs.in_display_state(listed, DisplayState.RUNNING)):
        (plan,) = json.loads(shown.explain(analyze=True, format="json"))
        assert max(num_rows(plan["Plan"], of="runs_operation")) <= 10 * number  # of 500 * number


def num_rows(node: dict[str, Any], *, of: str = "") -> Iterator[float]:
    """Yield how many rows came out of each step of a plan, or of each that reads a table."""
    if not of or node.get("Relation Name") == of:
        yield node["Actual Rows"] * node["Actual Loops"]
    for inner in node.get("Plans", []):
        yield from num_rows(inner, of=of)


def test_a_sampling_session_is_opened_once_per_number(session: Session, alice: User) -> None:
    def open_one(**changes: object) -> SamplingSession:
        fields = {"seq_id": 1, "base_model": rows.BASE_MODEL, "checkpoint": None} | changes
        return sampling.create_sampling_session(session, **fields)  # type: ignore[arg-type]

    assert open_one() == open_one()
    run, _ = create(session)
    with pytest.raises(RequestInvalid, match="sampling_session_seq_id: 1 already samples from mintweb/tiny"):
        open_one(checkpoint=rows.make_checkpoint(run))
    with pytest.raises(RequestInvalid, match="unknown base model"):
        open_one(seq_id=2, base_model="no/model")
    assert SamplingSession.objects.filter(session=session).count() == 1


def test_the_finished_samples_of_a_run_come_newest_first(alice: User, run: TrainingRun) -> None:
    session = rows.make_sampling_session(alice, rows.make_checkpoint(run))
    pks = [rows.sample(session, seq) for seq in range(3)]
    for pk in pks[:2]:
        rows.answer_sample(pk)
    assert [row.pk for row in sampling.samples_of(run, limit=9)] == [pks[1], pks[0]]


def test_samples_have_a_limit_of_their_own(alice: User, bob: User, worker: HandWorker) -> None:
    session = rows.make_sampling_session(alice)
    first = rows.sample(session, 0)
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO runs_operation (owner_id, sampling_session_id, seq, kind, state, payload_file, payload_digest,"
            " num_tokens, result_is_proto, error, error_category, fence, attempts, lone_attempts)"
            " SELECT owner_id, sampling_session_id, n, kind, state, '', '', 0, false, '', '', 0, 0, 0"
            " FROM runs_operation, generate_series(1, %s) n WHERE id = %s",
            [operations.MAX_QUEUED_SAMPLES - 1, first],
        )
    with pytest.raises(RateLimited):
        rows.sample(session, operations.MAX_QUEUED_SAMPLES)
    assert rows.sample(rows.make_sampling_session(bob), 0)
    commits.commit_samples({first: commits.Result(body=b"{}")})
    assert rows.sample(session, operations.MAX_QUEUED_SAMPLES)
