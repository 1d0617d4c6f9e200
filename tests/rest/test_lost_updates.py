"""Of several who change an object that they read at the same moment, one does: the others hear of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from runs.models import Dataset, TrainingRun
from tests.pages import seed
from tests.rest.client import Rest
from tests.services.races import race

pytestmark = pytest.mark.django_db(transaction=True)
NUM_WRITERS, NUM_ROUNDS = 8, 3
Changes = Callable[[int], dict[str, object]]


def names(number: int) -> dict[str, object]:
    return {"name": f"name {number}"}


def a_run(alice: Rest, run: TrainingRun) -> tuple[str, Changes]:
    return f"runs/{run.public_id}", names


def a_dataset(alice: Rest, run: TrainingRun) -> tuple[str, Changes]:
    return (
        f"datasets/{Dataset.objects.create(owner=alice.user, public_id='ds-1', name='rows').public_id}",
        names,
    )


def a_webhook(alice: Rest, run: TrainingRun) -> tuple[str, Changes]:
    made = alice.post("webhooks", {"url": "https://example.org/", "events": ["run.failed"]})
    return f"webhooks/{made['id']}", lambda number: {"url": f"https://example.org/{number}"}


def a_checkpoint(alice: Rest, run: TrainingRun) -> tuple[str, Changes]:
    made = seed.add_checkpoint(run, "one", step=1)
    path = f"runs/{run.public_id}/checkpoints/{made.kind}/{made.name}"
    return path, lambda number: {"ttl_seconds": 1000 + number}


@pytest.mark.parametrize("make", [a_run, a_dataset, a_webhook, a_checkpoint])
def test_one_of_many_changes_wins(
    alice: Rest, run: TrainingRun, make: Callable[[Rest, TrainingRun], tuple[str, Changes]]
) -> None:
    path, change = make(alice, run)
    for turn in range(NUM_ROUNDS):
        tag = alice.send("GET", path).headers["etag"]
        numbers = range(turn * NUM_WRITERS, (turn + 1) * NUM_WRITERS)
        replies = race(
            [partial(alice.send, "PATCH", path, change(number), if_match=tag) for number in numbers]
        )
        assert sorted(reply.status_code for reply in replies) == [200] + [412] * (NUM_WRITERS - 1)
