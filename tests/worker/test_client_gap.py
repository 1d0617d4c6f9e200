"""How long a run's client let the worker wait, step by step: what the server itself was busy with is none of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from gpuworker.intake import AHEAD
from runs.models import Metric, Operation, SamplingSession, TrainingRun, User
from runs.schemas import requests
from runs.schemas.sampling import Sample
from runs.services import operations
from runs.services.operations import Submission
from tests.services import rows
from tests.worker.conftest import Client, Start, finished, wait_for

NewClient = Callable[..., Client]
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79]
PAUSE_S = 1.0
# What a client takes to hear of an answer and to ask for the next thing, on a busy machine.
SLACK_S = 0.9


def gaps_of(run: TrainingRun) -> list[float]:
    """Return the time that each step of the run waited for its client."""
    gaps = Metric.objects.filter(run=run, name="client_gap_s")
    return list(gaps.order_by("seq").values_list("value", flat=True))


def pause() -> None:
    """Ask for nothing for a while."""
    until = time.monotonic() + PAUSE_S
    wait_for(lambda: time.monotonic() >= until, what="the end of the pause")


def test_what_was_asked_for_ahead_waits_for_nobody(start_worker: Start, new_client: NewClient) -> None:
    """Whatever a step consists of, and however many runs share a pass."""
    worker = start_worker()
    seats = worker._intake.seats
    ends = []
    with worker.scheduler._draining:
        clients = [new_client(seed=seed) for seed in range(4)]
        for client in clients:
            for step in range(3):
                client.forward_backward(TOKENS)
                client.forward_backward(TOKENS, forward_only=True)
                ends.append(client.optim_step())
                client.save(f"step{step}")
        wait_for(
            lambda: len(seats) == 4 and all(len(seat.queue) >= AHEAD for seat in list(seats.values())),
            what="all that may be taken ahead is taken",
        )
    for end in ends:
        finished(end)
    assert [gaps_of(client.run) for client in clients] == [[0.0] * 3] * 4


def test_a_client_that_pauses_is_waited_for(start_worker: Start, new_client: NewClient) -> None:
    start_worker()
    client = new_client()
    client.forward_backward(TOKENS)
    finished(client.optim_step())
    pause()
    client.forward_backward(TOKENS)
    finished(client.optim_step())
    finished(client.forward_backward(TOKENS))
    pause()
    finished(client.forward_backward(TOKENS, forward_only=True))
    pause()
    finished(client.optim_step())
    client.forward_backward(TOKENS)
    finished(client.optim_step())
    _, second, third, fourth = gaps_of(client.run)
    assert PAUSE_S <= second < PAUSE_S + SLACK_S
    assert 2 * PAUSE_S <= third < 2 * PAUSE_S + SLACK_S
    assert fourth < SLACK_S


def test_a_run_that_is_sampled_from_does_not_wait(start_worker: Start, new_client: NewClient) -> None:
    start_worker()
    client = new_client()
    client.forward_backward(TOKENS)
    client.optim_step()
    saved = finished(client.save_ephemeral(7))
    session: SamplingSession = wait_for(
        SamplingSession.objects.filter(run=client.run, seq_id=7).first, what="the sampling session"
    )
    drawn = [finished(pk) for pk in [draw(session, seq) for seq in range(2)]]
    forward = finished(client.forward_backward(TOKENS))
    finished(client.optim_step())
    assert saved.finished_at is not None
    idle_s = (forward.created_at - saved.finished_at).total_seconds()
    ends = [one.finished_at for one in drawn if one.finished_at is not None]
    drawn_s = (max(ends) - min(one.created_at for one in drawn)).total_seconds()
    assert drawn_s > 0.1
    assert gaps_of(client.run)[-1] == pytest.approx(idle_s - drawn_s, abs=0.1)


def draw(session: SamplingSession, seq: int) -> int:
    """Ask for a long sample and return the number of its operation."""
    body = {
        "sampling_session_id": session.public_id,
        "seq_id": seq,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 200, "seed": seq},
    }
    payload = requests.canonical_json(Sample.model_validate(body))
    return operations.submit_sample(session, Submission(kind=Operation.Kind.SAMPLE, seq=seq, payload=payload))


def test_a_run_without_a_client_waits_for_none(
    start_worker: Start, new_client: NewClient, alice: User
) -> None:
    client = new_client()
    rows.make_recipe(client.run, state="running")
    client.forward_backward(TOKENS)
    end = client.optim_step()
    start_worker()
    finished(end)
    names = Metric.objects.filter(run=client.run).values_list("name", flat=True)
    assert "queue_wait_s" in names
    assert "client_gap_s" not in names
