"""A replay that does not give what was answered before: told loudly, and on a CPU the end of the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.files.storage import default_storage
from pytest_django.fixtures import Settings

from gpuworker.engine import checkpoints
from runs.exceptions import RequestInvalid
from runs.models import Operation, RunEvent, Snapshot, TrainingRun, Worker
from runs.schemas import results
from tests.worker.conftest import Client, Start, finished, wait_for

NewClient = Callable[..., Client]
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]


def answer_of(operation_pk: int) -> bytes:
    operation = finished(operation_pk)
    assert operation.state == Operation.State.DONE, operation.error
    return bytes(operation.result or b"")


def event_of(client: Client, kind: str) -> RunEvent:
    event: RunEvent = wait_for(
        lambda: RunEvent.objects.filter(run=client.run, kind=kind).first(), what=f"the event {kind}"
    )
    return event


def shift_answer(operation_pk: int, by: float) -> bytes:
    """Store another answer: that of an engine whose log-probabilities are by so much larger."""
    arrays, metrics = results.decode_forward_backward(answer_of(operation_pk))
    other = results.encode_forward_backward([array + by for array in arrays], metrics)
    Operation.objects.filter(pk=operation_pk).update(result=other)
    return other


def change_fingerprint(directory: str, **values: str) -> None:
    """Make a snapshot one of another engine."""
    path = Path(default_storage.path(directory)) / checkpoints.STATE_FILE
    meta: dict[str, Any] = json.loads(path.read_text())
    meta["fingerprint"] |= values
    path.write_text(json.dumps(meta))


def test_on_a_cpu_it_ends_the_run_and_says_so(start_worker: Start, new_client: NewClient) -> None:
    client = new_client()
    first = client.forward_backward(TOKENS)
    client.optim_step()
    last = client.forward_backward(TOKENS[:5])
    worker = start_worker()
    answer_of(last)
    stored = shift_answer(first, 1e-6)
    worker.give_up(client.run.pk)

    late = [client.forward_backward(TOKENS), client.save("late"), client.record(1, {"loss": 1.0})]
    refused = [finished(pk) for pk in late]

    event = event_of(client, "diverged")
    assert (event.seq, event.detail["operation"], event.detail["seq"]) == (1, "forward_backward", 1)
    assert 0 < event.detail["largest_difference"] < 1e-5
    run = TrainingRun.objects.get(pk=client.run.pk)
    assert run.state == TrainingRun.State.FAILED
    assert run.error.startswith("diverged at operation 1 (forward_backward)")
    for operation in refused:
        assert (operation.state, operation.error) == (Operation.State.FAILED, run.error)
    assert not RunEvent.objects.filter(run=run, kind="recovered").exists()
    assert answer_of(first) == stored  # the first answer stands
    with pytest.raises(RequestInvalid, match="diverged at operation 1"):
        Client(run, seq=client.seq).forward_backward(TOKENS)


def test_a_run_that_ended_so_is_not_replayed_again(start_worker: Start, new_client: NewClient) -> None:
    client = new_client()
    first = client.forward_backward(TOKENS)
    worker = start_worker()
    answer_of(first)
    shift_answer(first, 1e-6)
    worker.give_up(client.run.pk)
    failed = finished(client.forward_backward(TOKENS))
    again = client.forward_backward(TOKENS)  # the client's copy of the row is open still

    worker.give_up(client.run.pk)

    assert finished(again).error == failed.error
    assert RunEvent.objects.filter(run=client.run, kind="diverged").count() == 1


@pytest.mark.parametrize(("shift", "is_told"), [(1e-5, False), (0.5, True)])
def test_fast_allows_a_small_difference_and_tells_of_a_large_one(
    shift: float, is_told: bool, start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    settings.REPLAY = "fast"
    client = new_client()
    first = client.forward_backward(TOKENS)
    worker = start_worker()
    answer_of(first)
    shift_answer(first, shift)
    worker.give_up(client.run.pk)

    answer_of(client.forward_backward(TOKENS))

    recovered = event_of(client, "recovered")
    assert recovered.detail["largest_difference"] == pytest.approx(shift, rel=0.9)
    assert RunEvent.objects.filter(run=client.run, kind="diverged").exists() is is_told
    assert TrainingRun.objects.get(pk=client.run.pk).state == TrainingRun.State.OPEN


def test_an_operation_that_fails_when_replayed_ends_the_run_in_every_mode(
    start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    settings.REPLAY = "fast"
    client = new_client()
    first = client.forward_backward(TOKENS)
    worker = start_worker()
    answer_of(first)
    Operation.objects.filter(pk=first).update(payload=b"torn")
    worker.give_up(client.run.pk)

    operation = finished(client.forward_backward(TOKENS))

    assert "it succeeded before and fails now" in operation.error
    assert event_of(client, "diverged").seq == 1


def test_a_snapshot_of_another_engine_allows_a_difference_and_flags_it(
    start_worker: Start, new_client: NewClient
) -> None:
    client = new_client()
    worker = start_worker()
    answer_of(client.forward_backward(TOKENS))
    worker.stop()
    worker = start_worker()
    last = client.forward_backward(TOKENS[:7])
    answer_of(last)
    shift_answer(last, 1e-5)  # as on another engine
    kept = Snapshot.objects.get(run=client.run)
    change_fingerprint(kept.directory, torch="2.0.0", threads="64", code="an older one")
    worker.give_up(client.run.pk)

    answer_of(client.forward_backward(TOKENS))

    event = event_of(client, "recovered")
    assert event.detail["engine"].startswith("code an older one -> ")
    assert "threads 64 -> " in event.detail["engine"]
    assert "torch 2.0.0 -> " in event.detail["engine"]
    assert event.detail["largest_difference"] == pytest.approx(1e-5, rel=0.9)
    assert not RunEvent.objects.filter(run=client.run, kind="diverged").exists()
    newer = Snapshot.objects.filter(run=client.run, seq__gt=kept.seq)
    wait_for(newer.exists, what="a snapshot of the present engine, at once")


def test_operations_of_another_engine_are_known_without_a_snapshot(
    start_worker: Start, new_client: NewClient
) -> None:
    client = new_client()
    worker = start_worker()
    first = client.forward_backward(TOKENS)
    answer_of(first)
    shift_answer(first, 1e-5)
    row = Worker.objects.get(pk=worker.row.pk)
    row.fingerprint[client.run.base_model] |= {"cpu_capability": "NONE"}
    row.save(update_fields=["fingerprint"])
    worker.give_up(client.run.pk)

    answer_of(client.forward_backward(TOKENS))

    assert event_of(client, "recovered").detail["engine"].startswith("cpu capability NONE -> ")


@pytest.mark.parametrize("entered", [{}, {"torch": "2.0.0", "threads": "1"}], ids=["nothing", "one for all"])
def test_operations_of_an_earlier_version_are_known_as_such(
    entered: dict[str, str], start_worker: Start, new_client: NewClient
) -> None:
    client = new_client()
    worker = start_worker()
    first = client.forward_backward(TOKENS)
    answer_of(first)
    shift_answer(first, 1e-5)
    Worker.objects.filter(pk=worker.row.pk).update(fingerprint=entered)
    worker.give_up(client.run.pk)

    answer_of(client.forward_backward(TOKENS))

    assert event_of(client, "recovered").detail["engine"].startswith("code unknown -> ")


def test_another_base_model_of_the_worker_makes_no_other_engine(
    start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    client = new_client()
    directory = settings.BASE_MODELS[client.run.base_model]
    settings.BASE_MODELS = {**settings.BASE_MODELS, "test/other": directory}
    worker = start_worker()
    answer_of(client.forward_backward(TOKENS))
    row = Worker.objects.get(pk=worker.row.pk)
    row.fingerprint["test/other"] |= {"dtype": "bfloat16"}
    row.save(update_fields=["fingerprint"])
    worker.give_up(client.run.pk)

    answer_of(client.forward_backward(TOKENS))

    assert "engine" not in event_of(client, "recovered").detail


def test_a_recovery_tells_how_much_was_replayed_and_how_long_it_took(
    start_worker: Start, new_client: NewClient
) -> None:
    client = new_client()
    worker = start_worker()
    client.forward_backward(TOKENS)
    answer_of(client.optim_step())
    worker.give_up(client.run.pk)
    answer_of(client.forward_backward(TOKENS))

    detail = event_of(client, "recovered").detail
    assert detail.keys() == {"from_seq", "num_replayed", "took_s"}
    assert detail["num_replayed"] == 3
    assert 0 <= detail["took_s"] < 30
    run = TrainingRun.objects.get(pk=client.run.pk)
    assert (run.lost_at, run.num_to_replay) == (None, 0)


def test_a_run_set_free_in_order_did_not_need_to_recover(start_worker: Start, new_client: NewClient) -> None:
    client = new_client()
    worker = start_worker()
    answer_of(client.forward_backward(TOKENS))
    worker.stop()
    start_worker()
    answer_of(client.forward_backward(TOKENS))
    assert event_of(client, "restored").detail == {"from_seq": 1, "num_replayed": 0}
    assert not RunEvent.objects.filter(run=client.run, kind="recovered").exists()
