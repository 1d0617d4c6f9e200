"""Operations through a real worker: order, isolation, metrics, checkpoints, samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from django.core.files.storage import default_storage
from django.db.models import F

from runs.models import Checkpoint, Metric, Operation, RunEvent, SamplingSession, Snapshot, TrainingRun
from runs.schemas import requests, results
from runs.schemas.sampling import Sample
from runs.services import checkpoints, operations
from runs.services.operations import GAP_PATIENCE_S, Submission
from tests.worker.conftest import Client, Start, finished, losses_of, wait_for

NewClient = Callable[..., Client]
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]


def test_loss_falls_and_metrics_appear(start_worker: Start, new_client: NewClient) -> None:
    start_worker()
    client = new_client()
    pairs = [(client.forward_backward(TOKENS), client.optim_step()) for _ in range(8)]

    losses = [losses_of(finished(pair[0])) for pair in pairs]
    finished(pairs[-1][1])

    assert losses[-1] < losses[0] - 1
    client.run.refresh_from_db()
    assert client.run.worker is not None
    assert (client.run.worker.device, client.run.worker.dtype) == ("cpu", "float32")
    assert client.run.step == 8
    assert client.run.applied_seq == 16
    assert client.run.num_tokens == 8 * (len(TOKENS) - 1)
    series = list(
        Metric.objects.filter(run=client.run, name="loss").order_by("seq").values_list("step", "value")
    )
    assert [step for step, _ in series] == list(range(1, 9))
    np.testing.assert_allclose([value for _, value in series], np.array(losses) / (len(TOKENS) - 1))


def test_recorded_metrics_are_of_their_own_step_and_change_nothing_else(
    start_worker: Start, new_client: NewClient
) -> None:
    start_worker()
    client = new_client()
    for _ in range(3):
        client.forward_backward(TOKENS)
        client.optim_step()
    recorded = finished(client.record(1, {"validation_loss": 0.5, "validation_loss/b": float("nan")}))

    client.run.refresh_from_db()
    assert (client.run.step, client.run.applied_seq) == (3, recorded.seq)
    assert client.run.loss is not None
    rows = dict(Metric.objects.filter(run=client.run, seq=recorded.seq, step=1).values_list("name", "value"))
    assert rows["validation_loss"] == 0.5
    assert np.isnan(rows["validation_loss/b"])


def test_operations_run_in_seq_order_whatever_order_they_arrive_in(
    start_worker: Start, new_client: NewClient
) -> None:
    ordered, shuffled = new_client(), new_client()
    in_order = [
        ordered.forward_backward(TOKENS, seq=1),
        ordered.optim_step(seq=2),
        ordered.forward_backward(TOKENS, seq=3),
    ]
    last = shuffled.forward_backward(TOKENS, seq=3)
    shuffled.optim_step(seq=2)
    shuffled.forward_backward(TOKENS, seq=1)

    start_worker()

    assert losses_of(finished(last)) == losses_of(finished(in_order[2]))


def test_a_bad_operation_fails_alone(start_worker: Start, new_client: NewClient) -> None:
    start_worker()
    client, neighbour = new_client(), new_client(seed=2)
    bad = client.forward_backward([5, 6, 500])
    after = client.forward_backward(TOKENS)
    beside = neighbour.forward_backward(TOKENS)

    failed = finished(bad)
    assert failed.state == Operation.State.FAILED
    assert failed.error_category == "user"
    assert "500" in failed.error
    assert losses_of(finished(after)) > 0
    assert losses_of(finished(beside)) > 0


def test_an_operation_whose_workers_died_is_tried_alone_and_then_given_up(
    start_worker: Start, new_client: NewClient
) -> None:
    client, neighbour = new_client(), new_client(seed=2)
    innocent, poison, after = (client.forward_backward(TOKENS) for _ in range(3))
    beside = neighbour.forward_backward(TOKENS)
    Operation.objects.filter(pk__in=[innocent, poison]).update(attempts=2)
    Operation.objects.filter(pk=poison).update(lone_attempts=2)

    start_worker()

    failed = finished(poison)
    assert (failed.state, failed.error_category) == (Operation.State.FAILED, "server")
    assert failed.error == "given up: it ended its worker 2 times"
    assert losses_of(finished(innocent)) == losses_of(finished(after))
    assert finished(innocent).lone_attempts == 1
    assert finished(after).lone_attempts == 0
    assert losses_of(finished(beside)) > 0


def test_a_missing_seq_is_waited_for_and_then_given_up(start_worker: Start, new_client: NewClient) -> None:
    start_worker()
    client = new_client()
    first = client.forward_backward(TOKENS, seq=1)
    third = client.forward_backward(TOKENS, seq=3)
    finished(first)
    wait_for(lambda: TrainingRun.objects.get(pk=client.run.pk).applied_seq == 1, what="the first operation")
    assert Operation.objects.get(pk=third).state == Operation.State.QUEUED

    long_ago = timedelta(seconds=GAP_PATIENCE_S + 1)
    Operation.objects.filter(pk=third).update(created_at=F("created_at") - long_ago)

    assert losses_of(finished(third)) > 0
    skipped = Operation.objects.get(run=client.run, seq=2)
    assert skipped.kind == Operation.Kind.SKIPPED
    assert skipped.state == Operation.State.FAILED


def test_a_saved_state_goes_on_as_if_never_saved(start_worker: Start, new_client: NewClient) -> None:
    start_worker()
    client = new_client()
    for _ in range(3):
        client.forward_backward(TOKENS)
        client.optim_step()
    saved = finished(client.save("three"))
    path = json.loads(bytes(saved.result or b""))["path"]
    assert path == f"tinker://{client.run.public_id}/weights/three"
    for _ in range(2):
        client.forward_backward(TOKENS)
        client.optim_step()
    expected = losses_of(finished(client.forward_backward(TOKENS)))

    other = new_client(seed=99)
    directory = Checkpoint.objects.get(run=client.run, name="three").directory
    other.load(directory, path, optimizer=True)
    for _ in range(2):
        other.forward_backward(TOKENS)
        other.optim_step()
    assert losses_of(finished(other.forward_backward(TOKENS))) == expected

    without = new_client(seed=99)
    without.load(directory, path, optimizer=False)
    for _ in range(2):
        without.forward_backward(TOKENS)
        without.optim_step()
    assert losses_of(finished(without.forward_backward(TOKENS))) != expected


def test_a_checkpoint_name_is_taken_once_unless_overwritten(
    start_worker: Start, new_client: NewClient
) -> None:
    start_worker()
    client = new_client()
    first, second, third = client.save("a"), client.save("a"), client.save("a", overwrite=True)
    assert finished(first).state == Operation.State.DONE
    assert "exists" in finished(second).error
    assert finished(third).state == Operation.State.DONE
    assert Checkpoint.objects.get(run=client.run, name="a").seq == 3
    folders = Path(default_storage.path(f"checkpoints/{client.run.pk}"))
    wait_for(lambda: [f.name[:2] for f in folders.iterdir()] == ["3-"], what="the removal of the old files")


def test_a_checkpoint_that_cannot_be_written_fails_alone(start_worker: Start, new_client: NewClient) -> None:
    start_worker()
    client, neighbour = new_client(), new_client(seed=2)
    finished(client.forward_backward(TOKENS))
    checkpoints_folder = Path(default_storage.path("checkpoints"))
    checkpoints_folder.mkdir(parents=True, exist_ok=True)
    obstacle = checkpoints_folder / str(client.run.pk)
    obstacle.write_text("a file where a folder should be")

    refused = finished(client.save("a"))

    assert refused.state == Operation.State.FAILED
    assert refused.error_category == "server"
    assert "cannot be written" in refused.error
    assert losses_of(finished(neighbour.forward_backward(TOKENS))) > 0
    obstacle.unlink()
    assert finished(client.save("a")).state == Operation.State.DONE


def test_an_unreadable_payload_fails_alone(start_worker: Start, new_client: NewClient) -> None:
    client = new_client()
    lost = client.forward_backward(TOKENS)
    Operation.objects.filter(pk=lost).update(payload=None, payload_file="payloads/ff/gone")
    after = client.forward_backward(TOKENS)
    start_worker()
    assert "cannot be read" in finished(lost).error
    assert losses_of(finished(after)) > 0


def test_a_run_given_up_in_memory_is_rebuilt_from_the_log(start_worker: Start, new_client: NewClient) -> None:
    undisturbed, disturbed = new_client(), new_client()
    expected = _train(undisturbed, num_steps=6)
    worker = start_worker()
    finished(_train(disturbed, num_steps=3))
    worker.give_up(disturbed.run.pk)

    again = _train(disturbed, num_steps=3)

    assert bytes(finished(again).result or b"") == bytes(finished(expected).result or b"")
    assert RunEvent.objects.filter(run=disturbed.run, kind="recovered").exists()


def test_sampling_from_the_newest_weights(start_worker: Start, new_client: NewClient) -> None:
    start_worker()
    client = new_client()
    for _ in range(60):
        client.forward_backward(TOKENS)
        client.optim_step(learning_rate=5e-3)
    assert losses_of(finished(client.forward_backward(TOKENS))) < 0.5
    made = finished(client.save_ephemeral(0))
    session_id = json.loads(bytes(made.result or b""))["sampling_session_id"]
    session = SamplingSession.objects.get(public_id=session_id)

    operation = finished(_sample(session, prompt=TOKENS[:4], max_tokens=4, temperature=0.0))

    output = results.decode_sample(bytes(operation.result or b""))
    assert output.sequences[0].tokens.tolist() == TOKENS[4:8]
    assert output.sequences[0].stop_reason == "length"


def test_a_loaded_state_is_kept_even_when_its_checkpoint_goes(
    start_worker: Start, new_client: NewClient
) -> None:
    worker = start_worker()
    client = new_client()
    client.forward_backward(TOKENS)
    client.optim_step()
    path = json.loads(bytes(finished(client.save("kept")).result or b""))["path"]
    checkpoint = Checkpoint.objects.get(run=client.run, name="kept")
    other = new_client(seed=99)
    finished(other.load(checkpoint.directory, path, optimizer=True))
    expected = losses_of(finished(client.forward_backward(TOKENS)))
    wait_for(lambda: Snapshot.objects.filter(run=other.run).exists(), what="the snapshot of the loaded state")
    checkpoints.delete(checkpoint)
    worker.stop()

    start_worker()

    assert losses_of(finished(other.forward_backward(TOKENS))) == expected


@pytest.mark.parametrize("is_rebuilt", [False, True])
def test_passes_whose_gradient_a_load_throws_away_count_for_no_step(
    is_rebuilt: bool, start_worker: Start, new_client: NewClient
) -> None:
    worker, client = start_worker(), new_client()
    path = json.loads(bytes(finished(client.save("kept")).result or b""))["path"]
    thrown_away = finished(client.forward_backward(TOKENS * 3))
    finished(client.load(Checkpoint.objects.get(run=client.run).directory, path, optimizer=True))
    if is_rebuilt:
        worker.give_up(client.run.pk)
    counted = losses_of(finished(client.forward_backward(TOKENS)))
    finished(client.optim_step())
    values = dict(Metric.objects.filter(run=client.run).values_list("name", "value"))
    assert values["loss_sum"] == pytest.approx(counted)
    assert values["tokens"] == len(TOKENS) - 1
    assert losses_of(thrown_away) != pytest.approx(counted)


def test_a_load_reads_what_was_there_when_it_was_asked_for(
    start_worker: Start, new_client: NewClient
) -> None:
    worker = start_worker()
    client, other = new_client(), new_client(seed=99)
    client.forward_backward(TOKENS)
    client.optim_step()
    path = json.loads(bytes(finished(client.save("latest")).result or b""))["path"]
    checkpoint = Checkpoint.objects.get(run=client.run, name="latest")
    expected = losses_of(finished(client.forward_backward(TOKENS)))
    worker.stop()
    load = other.load(checkpoint.directory, path, optimizer=True)
    checkpoints.delete(checkpoint)  # as a save of the same name does, or the end of its time

    start_worker()

    assert finished(load).state == Operation.State.DONE
    assert losses_of(finished(other.forward_backward(TOKENS))) == expected


def test_samples_of_deleted_weights_fail_in_words(start_worker: Start, new_client: NewClient) -> None:
    start_worker()
    client = new_client()
    finished(client.save_ephemeral(0))
    session = SamplingSession.objects.get(run=client.run)
    Checkpoint.objects.filter(run=client.run).delete()
    session.refresh_from_db()
    operation = finished(_sample(session, prompt=[1, 2], max_tokens=2))
    assert operation.state == Operation.State.FAILED
    assert "deleted" in operation.error


def test_a_run_is_bit_identical_with_neighbours(start_worker: Start, new_client: NewClient) -> None:
    alone = new_client(seed=5)
    last_alone = _train(alone)
    start_worker()
    expected = bytes(finished(last_alone).result or b"")

    crowd = [new_client(seed=seed, rank=2 + seed) for seed in range(7)]
    again = new_client(seed=5)
    lasts = [_train(client) for client in [*crowd, again]]
    assert bytes(finished(lasts[-1]).result or b"") == expected


def test_another_worker_goes_on_where_a_stopped_one_ended(start_worker: Start, new_client: NewClient) -> None:
    undisturbed, moved = new_client(), new_client()
    expected = _train(undisturbed, num_steps=6)
    first_half = _train(moved, num_steps=3)
    worker = start_worker()
    finished(first_half)
    worker.stop()
    assert TrainingRun.objects.get(pk=moved.run.pk).worker is None

    second_half = _train(moved, num_steps=3)
    start_worker()

    assert bytes(finished(second_half).result or b"") == bytes(finished(expected).result or b"")
    kinds = RunEvent.objects.filter(run=moved.run).values_list("kind", flat=True)
    assert "restored" in kinds
    assert "diverged" not in kinds


def _train(client: Client, *, num_steps: int = 4) -> int:
    last = 0
    for index in range(num_steps):
        last = client.forward_backward(TOKENS[index % 3 :])
        client.optim_step()
    return last


def _sample(session: SamplingSession, *, prompt: list[int], max_tokens: int, temperature: float = 1.0) -> int:
    body = Sample.model_validate(
        {
            "sampling_session_id": session.public_id,
            "seq_id": 0,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
            "sampling_params": {"max_tokens": max_tokens, "temperature": temperature},
        }
    )
    submission = Submission(kind=Operation.Kind.SAMPLE, seq=0, payload=requests.canonical_json(body))
    return operations.submit_sample(session, submission)
