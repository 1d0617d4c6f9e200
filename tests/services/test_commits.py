"""Commits: one chain of compare-and-swaps; whoever is not next in it writes nothing at all."""

from __future__ import annotations

import dataclasses
import json
import math
from datetime import timedelta
from functools import partial
from typing import Any

import psycopg
import pytest
from django.db import IntegrityError, connection, models
from django.db.models.functions import Now
from django.test import TestCase

from runs import events
from runs.models import (
    Checkpoint,
    Metric,
    Operation,
    RunEvent,
    SamplingSession,
    Snapshot,
    TrainingRun,
    User,
)
from runs.services import claims, commits, workers
from runs.services.commits import NewCheckpoint, Result, RunCommit
from tests.services import rows
from tests.services.hand_worker import HandWorker, applied, commit_of
from tests.services.races import race

METRICS = {"loss": 1.5, "grad_norm": 0.25}


def new_checkpoint(name: str = "one", **changes: Any) -> NewCheckpoint:
    fields: dict[str, Any] = {
        "kind": "weights",
        "directory": f"checkpoints/1/{name}",
        "size_bytes": 9,
    } | changes
    return NewCheckpoint(name=name, **fields)


def full_commit(run: TrainingRun, worker: HandWorker, **changes: Any) -> RunCommit:
    """Return a commit of seqs 0 to 2 with a result, metrics and a checkpoint."""
    first, second = rows.optim_step(run, 1), rows.optim_step(run, 2)
    create = Operation.objects.get(run=run, seq=0).pk
    cycle = [
        applied(create, 0),
        applied(first, 1, result=Result(body=b"one"), metrics=METRICS),
        applied(second, 2, result=Result(body=b"two", is_proto=True), checkpoint=new_checkpoint()),
    ]
    return dataclasses.replace(commit_of(worker.hold(run), cycle, loss=1.5), **changes)


def content() -> dict[str, list[dict[str, Any]]]:
    """Return every row that a commit could touch."""
    tables: list[type[models.Model]] = [TrainingRun, Operation, Metric, Checkpoint, SamplingSession, RunEvent]
    return {table.__name__: list(table._default_manager.order_by("pk").values()) for table in tables}


def test_results_metrics_and_checkpoints_appear_together(run: TrainingRun, worker: HandWorker) -> None:
    commit = full_commit(run, worker)
    assert commits.commit_all([commit]) == [True]
    run.refresh_from_db()
    assert (run.applied_seq, run.step, run.num_tokens, run.loss, run.state) == (2, 2, 10, 1.5, "open")
    assert run.last_applied_at is not None
    one, two = Operation.objects.filter(run=run, seq__gt=0).order_by("seq")
    assert (one.state, bytes(one.result or b""), one.result_is_proto, one.fence) == ("done", b"one", False, 1)
    assert (bytes(two.result or b""), two.result_is_proto) == (b"two", True)
    assert one.finished_at is not None
    assert {(m.name, m.seq, m.step, m.value) for m in Metric.objects.filter(run=run)} == {
        ("loss", 1, 1, 1.5),
        ("grad_norm", 1, 1, 0.25),
    }
    checkpoint = Checkpoint.objects.get(run=run)
    assert (checkpoint.name, checkpoint.seq, checkpoint.owner_id) == ("one", 2, run.owner_id)


def test_a_stale_fence_writes_nothing(run: TrainingRun, worker: HandWorker) -> None:
    commit = full_commit(run, worker)
    worker.release(run)
    HandWorker().hold(run)
    before = content()
    assert commits.commit_all([commit]) == [False]
    assert content() == before


@pytest.mark.parametrize("from_seq", [0, -2, 2])
def test_a_wrong_from_seq_writes_nothing(run: TrainingRun, worker: HandWorker, from_seq: int) -> None:
    commit = full_commit(run, worker, from_seq=from_seq)
    before = content()
    assert commits.commit_all([commit]) == [False]
    assert content() == before


def test_a_zombie_that_recomputed_the_same_seqs_writes_nothing(run: TrainingRun, worker: HandWorker) -> None:
    zombie_commit = full_commit(run, worker)
    worker.release(run)
    successor = HandWorker()
    own = dataclasses.replace(zombie_commit, fence=successor.hold(run).fence)
    assert commits.commit_all([own]) == [True]
    before = content()
    assert commits.commit_all([zombie_commit]) == [False]
    assert content() == before


def test_a_commit_repeated_after_a_lost_confirmation_doubles_nothing(
    run: TrainingRun, worker: HandWorker
) -> None:
    commit = full_commit(run, worker)
    assert commits.commit_all([commit]) == [True]
    before = content()
    assert commits.commit_all([commit]) == [True]
    assert content() == before


def test_a_lost_run_does_not_hold_up_the_others(alice: User, run: TrainingRun, worker: HandWorker) -> None:
    other = rows.make_run(alice)
    good, lost = full_commit(run, worker), full_commit(other, worker)
    worker.release(other)
    HandWorker().hold(other)
    assert commits.commit_all([lost, good]) == [False, True]
    run.refresh_from_db()
    other.refresh_from_db()
    assert (run.applied_seq, other.applied_seq) == (2, -1)
    assert not Metric.objects.filter(run=other).exists()
    assert not Checkpoint.objects.filter(run=other).exists()


def test_a_commit_that_breaks_a_constraint_leaves_nothing_behind(
    run: TrainingRun, worker: HandWorker
) -> None:
    rows.make_checkpoint(run, "one")
    create = Operation.objects.get(run=run, seq=0)
    run.refresh_from_db()
    worker.held.clear()
    pk = rows.optim_step(run, 2)
    cycle = [applied(pk, 2, metrics=METRICS, checkpoint=new_checkpoint("one"))]
    commit = commit_of(worker.hold(run), cycle)
    before = content()
    with pytest.raises(IntegrityError, match="checkpoint_name_once_per_run"):
        commits.commit_all([commit])
    assert content() == before
    assert create.run_id == run.pk


@pytest.mark.django_db(transaction=True)
def test_of_many_commits_racing_for_one_seq_one_is_applied(run: TrainingRun, worker: HandWorker) -> None:
    """Owner and zombies alike: the chain moves once."""
    commit = full_commit(run, worker)
    rivals = [
        dataclasses.replace(commit, fence=commit.fence + offset) for offset in (0, -1, 1, 2) for _ in range(3)
    ]
    answers = race([partial(commits.commit_all, [rival]) for rival in rivals])
    assert [answer for rival, answer in zip(rivals, answers, strict=True) if rival.fence != commit.fence] == [
        [False]
    ] * 9
    assert Metric.objects.filter(run=run).count() == 2
    run.refresh_from_db()
    assert (run.applied_seq, run.num_tokens) == (2, 10)


@pytest.mark.django_db(transaction=True)
def test_takeovers_during_commits_lose_and_double_nothing(run: TrainingRun, worker: HandWorker) -> None:
    """Two workers fight for a run; whoever holds it commits the next seq, the other one's commit must fail."""
    num_ops = 30
    pks = [Operation.objects.get(run=run, seq=0).pk] + [
        rows.optim_step(run, seq) for seq in range(1, num_ops)
    ]
    worker.release(run)

    def fight(row: Any) -> list[int]:
        done: list[int] = []
        while TrainingRun.objects.get(pk=run.pk).applied_seq < num_ops - 1:
            TrainingRun.objects.filter(pk=run.pk).update(worker=None)  # as if the other one had died
            for held in claims.claim_runs(row, [rows.BASE_MODEL]):
                seq = held.applied_seq + 1
                if (
                    seq < num_ops
                    and commits.commit_all([commit_of(held, [applied(pks[seq], seq, metrics=METRICS)])])[0]
                ):
                    done.append(seq)
        return done

    done = race([partial(fight, HandWorker().row) for _ in range(3)])
    assert sorted(seq for part in done for seq in part) == list(range(num_ops))
    run.refresh_from_db()
    assert run.num_tokens == 10 * num_ops
    assert Metric.objects.filter(run=run).count() == 2 * num_ops


def test_a_failed_operation_keeps_its_error_and_category(run: TrainingRun, worker: HandWorker) -> None:
    pk = rows.optim_step(run, 1)
    worker.finish(pk, Result(error="loss is not finite", category="user"))
    row = Operation.objects.get(pk=pk)
    assert (row.state, row.error, row.error_category, row.result) == (
        "failed",
        "loss is not finite",
        "user",
        None,
    )


def test_a_finished_operation_never_changes_again(run: TrainingRun, worker: HandWorker) -> None:
    pk = rows.optim_step(run, 1)
    worker.finish(pk, Result(body=b"first"))
    held = worker.hold(run)
    assert commits.commit_all(
        [commit_of(held, [applied(pk, 2, result=Result(body=b"second"))], from_seq=1)]
    ) == [True]
    assert bytes(Operation.objects.get(pk=pk).result or b"") == b"first"


def test_an_infinite_loss_stays_out_of_the_run_but_in_its_metrics(
    run: TrainingRun, worker: HandWorker
) -> None:
    pk = rows.optim_step(run, 1)
    create = Operation.objects.get(run=run, seq=0).pk
    cycle = [applied(create, 0), applied(pk, 1, metrics={"loss": math.inf})]
    assert commits.commit_all([commit_of(worker.hold(run), cycle, loss=math.inf)]) == [True]
    run.refresh_from_db()
    assert run.loss is None
    assert Metric.objects.get(run=run, name="loss").value == math.inf


def test_overwriting_replaces_the_row(run: TrainingRun, worker: HandWorker) -> None:
    commit = full_commit(run, worker)
    commits.commit_all([commit])
    pk = rows.optim_step(run, 3)
    new = new_checkpoint("one", directory="checkpoints/1/new", overwrite=True, user_metadata={"a": "b"})
    held = worker.hold(run)
    assert commits.commit_all([commit_of(held, [applied(pk, 3, checkpoint=new)], from_seq=2)]) == [True]
    checkpoint = Checkpoint.objects.get(run=run)
    assert (checkpoint.directory, checkpoint.seq, checkpoint.user_metadata) == (
        "checkpoints/1/new",
        3,
        {"a": "b"},
    )


def test_a_lifetime_counts_from_the_commit_by_the_databases_clock(
    run: TrainingRun, worker: HandWorker
) -> None:
    pk = rows.optim_step(run, 1)
    worker.finish(pk, checkpoint=new_checkpoint(ttl_seconds=3600))
    within = Checkpoint.objects.filter(
        run=run, expires_at__gt=Now() + timedelta(minutes=59), expires_at__lt=Now() + timedelta(minutes=61)
    )
    assert within.count() == 1


def test_an_ephemeral_save_opens_its_sampling_session_once(run: TrainingRun, worker: HandWorker) -> None:
    pk = rows.optim_step(run, 1)
    new = new_checkpoint("ephemeral-1", kind="sampler_weights", is_ephemeral=True, sampling_session_seq=4)
    worker.finish(pk, checkpoint=new)
    session = SamplingSession.objects.get(run=run)
    assert session.public_id == f"{run.session.public_id}:sample:4"
    assert (session.owner_id, session.base_model, session.seq_id) == (run.owner_id, run.base_model, 4)
    assert session.checkpoint == Checkpoint.objects.get(run=run)


def test_the_first_answer_of_a_sample_stands(alice: User, worker: HandWorker) -> None:
    pk = rows.sample(rows.make_sampling_session(alice), 0)
    commits.commit_samples({pk: Result(body=b"first", is_proto=True)})
    commits.commit_samples({pk: Result(error="late", category="server")})
    row = Operation.objects.get(pk=pk)
    assert (row.state, bytes(row.result or b""), row.error) == ("done", b"first", "")


@pytest.mark.django_db(transaction=True)
def test_of_racing_answers_of_a_sample_one_stands(alice: User, worker: HandWorker) -> None:
    pk = rows.sample(rows.make_sampling_session(alice), 0)
    bodies = [bytes([65 + index]) for index in range(8)]
    with psycopg.connect(**connection.get_connection_params(), autocommit=True) as listener:
        listener.execute(f"LISTEN {events.DONE_CHANNEL}")
        race([partial(commits.commit_samples, {pk: Result(body=body)}) for body in bodies])
        notices = [json.loads(notice.payload) for notice in listener.notifies(timeout=0.5)]
    assert bytes(Operation.objects.get(pk=pk).result or b"") in bodies
    assert notices == [[pk]]


@pytest.mark.django_db(transaction=True)
def test_waiting_requests_are_told_after_the_commit_and_not_without_one(
    run: TrainingRun, worker: HandWorker
) -> None:
    commit = full_commit(run, worker)
    pks = [op.pk for op in commit.operations]
    with psycopg.connect(**connection.get_connection_params(), autocommit=True) as listener:
        listener.execute(f"LISTEN {events.DONE_CHANNEL}")
        commits.commit_all([dataclasses.replace(commit, fence=commit.fence + 1)])
        commits.commit_all([commit])
        notices = [json.loads(notice.payload) for notice in listener.notifies(timeout=5, stop_after=1)]
    assert notices == [pks]


def test_a_failed_run_stays_failed(run: TrainingRun, worker: HandWorker) -> None:
    held = worker.hold(run)
    create = Operation.objects.get(run=run, seq=0).pk
    failed = commit_of(held, [applied(create, 0, result=Result(error="no room", category="server"))])
    assert commits.commit_all([dataclasses.replace(failed, state="failed", error="no room")]) == [True]
    after = commit_of(held, [applied(rows.optim_step(run, 1), 1)], from_seq=0)
    assert commits.commit_all([after]) == [True]
    run.refresh_from_db()
    assert (run.state, run.error, run.applied_seq) == ("failed", "no room", 1)


def test_a_request_that_arrives_after_its_seq_was_given_up_is_answered(
    run: TrainingRun, worker: HandWorker
) -> None:
    held = worker.hold(run)
    create = Operation.objects.get(run=run, seq=0).pk
    late = rows.optim_step(run, 1)
    given_up = [applied(create, 0), applied(None, 1), applied(rows.optim_step(run, 2), 2)]
    assert commits.commit_all([commit_of(held, given_up)]) == [True]
    row = Operation.objects.get(pk=late)
    assert (row.state, row.error_category) == ("failed", "user")
    assert "given up" in row.error


def test_two_snapshots_are_kept(run: TrainingRun) -> None:
    TrainingRun.objects.filter(pk=run.pk).update(fence=1)
    removed = [
        commits.register_snapshot(run.pk, fence=1, seq=seq, directory=f"snapshots/1/{seq}", size_bytes=1)
        for seq in (10, 20, 30, 40, 40)
    ]
    assert removed == [[], [], ["snapshots/1/10"], ["snapshots/1/20"], []]
    assert list(Snapshot.objects.filter(run=run).values_list("directory", flat=True)) == [
        "snapshots/1/40",
        "snapshots/1/30",
    ]


def test_of_two_snapshots_after_one_operation_the_first_stands(run: TrainingRun) -> None:
    TrainingRun.objects.filter(pk=run.pk).update(fence=1)
    register = partial(commits.register_snapshot, run.pk, fence=1, seq=10, size_bytes=1)
    assert [
        register(directory=name) for name in ("snapshots/1/one", "snapshots/1/two", "snapshots/1/one")
    ] == [[], ["snapshots/1/two"], []]
    assert Snapshot.objects.get(run=run).directory == "snapshots/1/one"


def test_a_snapshot_that_comes_late_does_not_push_out_newer_ones(run: TrainingRun) -> None:
    TrainingRun.objects.filter(pk=run.pk).update(fence=2)
    for seq in (20, 30):
        commits.register_snapshot(run.pk, fence=2, seq=seq, directory=f"snapshots/1/{seq}", size_bytes=1)
    assert commits.register_snapshot(run.pk, fence=1, seq=10, directory="snapshots/1/late", size_bytes=1) == [
        "snapshots/1/late"
    ]


def test_a_snapshot_of_a_former_owner_is_not_entered(run: TrainingRun) -> None:
    TrainingRun.objects.filter(pk=run.pk).update(fence=2)
    assert commits.register_snapshot(
        run.pk, fence=1, seq=99, directory="snapshots/1/stale", size_bytes=1
    ) == ["snapshots/1/stale"]
    assert not Snapshot.objects.filter(run=run).exists()


def test_an_event_is_entered(run: TrainingRun) -> None:
    commits.add_event(run.pk, seq=3, step=2, kind="recovered", detail={"from_seq": 1})
    event = RunEvent.objects.get(run=run)
    assert (event.seq, event.step, event.kind, event.detail) == (3, 2, "recovered", {"from_seq": 1})


def test_pages_are_told_once_the_commit_is_through(run: TrainingRun, worker: HandWorker) -> None:
    commit = full_commit(run, worker)
    with TestCase.captureOnCommitCallbacks() as callbacks:
        commits.commit_all([commit])
    assert len(callbacks) == 1
    workers.stop(worker.row)
