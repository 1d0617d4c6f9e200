"""A run whose client has closed its session ends: its state for recovery goes, its checkpoints stay and can be used."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.db.models.functions import Now

from runs.models import Checkpoint, Operation, Session, Snapshot, TrainingRun, User
from runs.services import closed_sessions, expired_operations, operations, sessions, training_runs
from runs.services.training_runs import Start
from tests.worker.conftest import Client, finished, losses_of, wait_for
from tests.worker.conftest import Start as StartWorker

TOKENS = [3, 14, 15, 92, 65, 35, 89, 79]


@pytest.mark.parametrize("is_held", [True, False])
def test_a_run_of_a_closed_session_ends_and_its_checkpoint_is_gone_on_with(
    is_held: bool, start_worker: StartWorker, new_client: Callable[..., Client], alice: User
) -> None:
    worker = start_worker()
    client = new_client()
    first = client.forward_backward(TOKENS)
    client.optim_step()
    finished(client.save("final"))
    worker.give_up(client.run.pk)
    finished(client.forward_backward(TOKENS, forward_only=True))
    if not is_held:
        worker.stop()
        start_worker()
    assert Snapshot.objects.filter(run=client.run).exists() != is_held
    sessions.finish(client.run.session, "success")
    long_ago = Now() - timedelta(seconds=2 * closed_sessions.AFTER_S)
    Session.objects.filter(pk=client.run.session_id).update(finished_at=long_ago)
    closed_sessions.let_runs_go()
    ended = finished(operations.unload(client.run))
    assert (ended.kind, ended.state) == (Operation.Kind.UNLOAD_MODEL, Operation.State.DONE)
    wait_for(
        lambda: TrainingRun.objects.filter(pk=client.run.pk, state=TrainingRun.State.CLOSED).exists(),
        what="the run is closed",
    )
    expired_operations.forget()
    assert not Snapshot.objects.filter(run=client.run).exists()
    assert not Operation.objects.filter(run=client.run, payload__isnull=False).exists()
    checkpoint = Checkpoint.objects.get(run=client.run, name="final")
    fork, _ = training_runs.create_run(
        sessions.create_session(alice),
        model_seq_id=0,
        base_model=client.run.base_model,
        lora=training_runs.lora_of(checkpoint),
        start=Start(checkpoint=checkpoint, with_optimizer=True),
    )
    again = Client(fork).forward_backward(TOKENS)
    assert losses_of(finished(again)) < losses_of(Operation.objects.get(pk=first))
