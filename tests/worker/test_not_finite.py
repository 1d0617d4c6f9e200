"""Numbers that are none: they fail what made them, never reach Adam's moments, and show on the chart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from pytest_django.fixtures import Settings

from gpuworker import snapshots
from runs.models import Metric, Operation, RunEvent, Snapshot, TrainingRun
from runs.services import metrics
from tests.worker.conftest import Client, Start, finished, losses_of, wait_for

NewClient = Callable[..., Client]
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
# A loss of the one weight is infinite. A gradient of the other is finite, but so many of them added up are not.
LARGE = 5e35
INFINITE = 1e38
ACCUMULATED = 150


def events_of(client: Client) -> list[str]:
    return list(RunEvent.objects.filter(run=client.run).order_by("id").values_list("kind", flat=True))


def refuse(word: str) -> NoReturn:
    raise AssertionError(f"{word} in JSON")


def strict(text: bytes | str) -> Any:
    return json.loads(text, parse_constant=refuse)


def overflow(client: Client) -> list[int]:
    """Add up gradients until their sum is infinite, and ask for a step."""
    sent = [client.forward_backward(TOKENS, weight=LARGE) for _ in range(ACCUMULATED)]
    return [*sent, client.optim_step()]


def test_a_loss_that_is_not_finite_fails_alone_and_leaves_adam_whole(
    start_worker: Start, new_client: NewClient
) -> None:
    worker = start_worker()
    client, undisturbed = new_client(), new_client()
    failed = finished(client.forward_backward(TOKENS, weight=INFINITE))
    assert (failed.state, failed.error_category) == (Operation.State.FAILED, "user")
    assert failed.error == "the loss is inf"
    for one in (client, undisturbed):
        one.forward_backward(TOKENS)
        last = one.optim_step()
        finished(last)
    assert events_of(client) == ["not_finite"]
    worker.stop()
    kept = [snapshots.fetch(Snapshot.objects.get(run=one.run).directory) for one in (client, undisturbed)]
    assert kept[0].optimizer is not None
    assert kept[1].optimizer is not None
    assert torch.equal(kept[0].weights, kept[1].weights)
    assert torch.equal(kept[0].optimizer.exp_avg, kept[1].optimizer.exp_avg)
    assert torch.equal(kept[0].optimizer.exp_avg_sq, kept[1].optimizer.exp_avg_sq)


def test_a_step_on_an_infinite_gradient_is_skipped_and_told(
    start_worker: Start, new_client: NewClient
) -> None:
    start_worker()
    client, undisturbed = new_client(), new_client()
    for one in (client, undisturbed):
        one.forward_backward(TOKENS)
        finished(one.optim_step())
    for pk in overflow(client):
        assert finished(pk).state == Operation.State.DONE
    for one in (client, undisturbed):
        last = one.forward_backward(TOKENS)
        one_loss = losses_of(finished(last))
        assert math.isfinite(one_loss)
    expected = finished(undisturbed.optim_step())
    assert bytes(finished(client.optim_step()).result or b"") == bytes(expected.result or b"")
    assert events_of(client) == ["step_skipped"]
    skipped = Metric.objects.filter(run=client.run, name="skipped")
    assert [metric.value for metric in skipped] == [1.0]
    for point in metrics.points_after(client.run, -1, limit=1000):
        strict(json.dumps(point.as_json(), allow_nan=False))


def test_a_skipped_step_is_skipped_again_when_replayed(start_worker: Start, new_client: NewClient) -> None:
    worker = start_worker()
    client, undisturbed = new_client(), new_client()
    for one in (client, undisturbed):
        overflow(one)
        one.forward_backward(TOKENS)
        finished(one.optim_step())
    worker.give_up(client.run.pk)
    results = [finished(one.forward_backward(TOKENS)) for one in (client, undisturbed)]
    assert bytes(results[0].result or b"") == bytes(results[1].result or b"")
    assert "diverged" not in events_of(client)


def test_a_step_that_was_skipped_ends_no_run_that_is_replayed_under_fail(
    start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    worker = start_worker()
    client, undisturbed = new_client(), new_client()
    for one in (client, undisturbed):
        overflow(one)
        one.forward_backward(TOKENS)
        finished(one.optim_step())
    settings.NONFINITE = "fail"
    worker.give_up(client.run.pk)
    losses = [losses_of(finished(one.forward_backward(TOKENS))) for one in (client, undisturbed)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("way", ["loss", "gradient"])
def test_fail_ends_the_run_with_the_reason(
    way: str, start_worker: Start, new_client: NewClient, settings: Settings
) -> None:
    settings.NONFINITE = "fail"
    start_worker()
    client = new_client()
    last = client.forward_backward(TOKENS, weight=INFINITE) if way == "loss" else overflow(client)[-1]
    assert finished(last).error_category == "user"
    run = wait_for(
        lambda: TrainingRun.objects.filter(pk=client.run.pk, state=TrainingRun.State.FAILED).first(),
        what="the end of the run",
    )
    assert run.error.startswith("ended at step 0: the ")
    later = finished(client.forward_backward(TOKENS))
    assert (later.state, later.error) == (Operation.State.FAILED, run.error)


def test_many_bad_steps_make_one_event(start_worker: Start, new_client: NewClient) -> None:
    start_worker()
    client = new_client()
    for _ in range(5):
        client.forward_backward(TOKENS, weight=INFINITE)
        last = client.optim_step()
    finished(last)
    assert events_of(client) == ["not_finite"]
