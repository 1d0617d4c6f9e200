"""Talking to weights: who may."""

from __future__ import annotations

from functools import partial

import pytest

from runs.exceptions import NotFound
from runs.models import TrainingRun, User
from runs.services import checkpoints, playground
from tests.services import rows


def test_weights_that_were_taken_back_answer_their_owner_alone(
    alice: User, bob: User, run: TrainingRun
) -> None:
    checkpoint = rows.make_checkpoint(run, is_public=True)
    of_alice, of_bob = (rows.make_sampling_session(who, checkpoint) for who in (alice, bob))
    ask = partial(playground.submit, max_tokens=1, temperature=0.0, seed=1, stop_tokens=[])
    ask(of_bob, [1], seq=0)
    checkpoints.set_public(checkpoint, is_public=False)
    with pytest.raises(NotFound, match="there is no checkpoint"):
        ask(of_bob, [1], seq=1)
    ask(of_alice, [1], seq=1)
