"""Sampling and training on one device: each gets half while both have work, and neither starves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from gpuworker.device_share import DeviceShare
from gpuworker.worker import GpuWorker
from runs.models import Checkpoint, Operation, User
from runs.schemas import requests
from runs.schemas.sampling import StoredSample
from runs.services import operations, sampling, sessions
from runs.services.operations import Submission
from tests.worker.conftest import Client, finished

TOKENS = [3, 14, 15, 92, 65, 35, 89, 79]


@pytest.mark.parametrize(("cycle_s", "step_s"), [(1.0, 0.1), (0.01, 0.3), (2.0, 2.0)])
def test_each_side_gets_half_of_a_contended_device(cycle_s: float, step_s: float) -> None:
    share = DeviceShare()
    trained_s = sampled_s = 0.0
    while trained_s < 100:
        share.note_cycle(cycle_s)
        trained_s += cycle_s
        while share.is_samplings_turn:
            share.note_step(step_s)
            sampled_s += step_s
        assert abs(trained_s - sampled_s) <= max(cycle_s, step_s) + 1e-9


def test_the_first_step_follows_the_first_cycle() -> None:
    share = DeviceShare()
    share.note_cycle(60.0)
    assert share.is_samplings_turn


def test_an_idle_side_saves_nothing_up() -> None:
    share = DeviceShare()
    share.note_cycle(60.0)
    share.settle()
    assert not share.is_samplings_turn
    share.note_step(60.0)
    share.settle()
    share.note_cycle(0.001)
    assert share.is_samplings_turn


def test_a_long_sample_and_a_long_training_both_move_on(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client], alice: User, base_model: str
) -> None:
    """Both wait when the worker starts; the sample ends while training is under way, not before or after it."""
    client = new_client()
    num_steps = 200
    for _ in range(num_steps):
        client.forward_backward(TOKENS)
        client.optim_step()
    sample = ask(alice, base_model, num_tokens=100)
    start_worker()

    ended_at = finished(sample).finished_at

    trained = Operation.objects.filter(run=client.run, finished_at__lt=ended_at).count()
    assert 10 < trained < 2 * num_steps


def ask(
    user: User,
    base_model: str,
    *,
    num_tokens: int,
    num_samples: int = 1,
    prompt: Sequence[int] = (1, 2, 3),
    checkpoint: Checkpoint | None = None,
) -> int:
    """Ask for a sample with a fixed seed and return the number of its operation."""
    session = sampling.create_sampling_session(
        sessions.create_session(user), seq_id=0, base_model=base_model, checkpoint=checkpoint
    )
    body = StoredSample.model_validate(
        {
            "sampling_session_id": session.public_id,
            "seq_id": 0,
            "num_samples": num_samples,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
            "sampling_params": {"max_tokens": num_tokens, "seed": 7, "stop": []},
        }
    )
    payload = requests.canonical_json(body)
    return operations.submit_sample(session, Submission(kind=Operation.Kind.SAMPLE, seq=0, payload=payload))
