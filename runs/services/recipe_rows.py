"""The row of a recipe under its lock: what steering and the loop that trains both do to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from django.conf import settings
from django.db import transaction
from django.db.models import QuerySet

from runs import events
from runs.exceptions import NotFound
from runs.models import Checkpoint, Operation, Recipe
from runs.schemas import requests
from runs.services import access, commits, loads, operations, sampling
from runs.services.operations import Submission

State = Recipe.State
# The names of the checkpoints that nobody asks for: the last one, and one every so many steps.
FINAL: Final = "final"
AUTOMATIC: Final = "step-"
HOLDING_A_SLOT: Final = (State.RUNNING, State.FINISHING, State.STOPPING)
ACTIVE: Final = (State.PREPARING, State.QUEUED, State.DISCARDING, *HOLDING_A_SLOT)
ENDED: Final = (State.FINISHED, State.STOPPED, State.DISCARDED, State.FAILED)
# An operation of these that fails leaves the run in a state that its recipe did not mean.
FATAL: Final = (
    Operation.Kind.CREATE_MODEL,
    Operation.Kind.FORWARD_BACKWARD,
    Operation.Kind.OPTIM_STEP,
    Operation.Kind.LOAD_WEIGHTS,
)


def num_slots() -> int:
    """Return how many runs without code train at once; the others wait in a queue."""
    slots: int = settings.CONCURRENT_RUNS
    return slots


def holding_a_slot() -> QuerySet[Recipe]:
    """Return the recipes that others wait for; one that was stopped before it started is none of them."""
    rows = Recipe.objects.filter(state__in=HOLDING_A_SLOT)
    return rows.exclude(state=State.STOPPING, started_at=None)


def has_free_slot() -> bool:
    """Say whether one more may train now; only the transaction that starts it knows for certain."""
    return holding_a_slot().count() < num_slots()


def saved_by(checkpoint: Checkpoint) -> Recipe | None:
    """Return the recipe of the run that saved a checkpoint; a client's run has none."""
    return Recipe.objects.filter(run=checkpoint.run_id).first()


class RunDeleted(NotFound):
    """the run was deleted just now"""


@contextmanager
def locked(recipe: Recipe) -> Iterator[Recipe]:
    """Give the recipe's row as it is now, locked, and save it afterwards; one transaction.

    Raises:
        RunDeleted: there is none any more.
    """
    with transaction.atomic():
        rows = Recipe.objects.select_for_update(of=("self",)).select_related("run")
        row = rows.filter(pk=recipe.pk).first()
        if row is None:
            raise RunDeleted
        yield row
        row.save()
        events.run_changed(row.run_id, row.run.owner_id, row.run.public_id)


def submit(row: Recipe, kind: str, payload: bytes, *, num_tokens: int = 0) -> int:
    """Enter the locked recipe's next operation into the log and return its seq."""
    return _enter(row, Submission(kind=kind, seq=row.next_seq, payload=payload, num_tokens=num_tokens))


def submit_load(row: Recipe, checkpoint: Checkpoint) -> int:
    """Submit a load of weights and optimizer state of one of the run's checkpoints.

    Raises:
        NotFound: it was deleted meanwhile.
    """
    access.lock(checkpoint)
    return _enter(
        row,
        loads.submission(
            Operation.Kind.LOAD_WEIGHTS,
            seq=row.next_seq,
            path=sampling.path_of(checkpoint),
            with_optimizer=True,
            directory=checkpoint.directory,
        ),
    )


def submit_save(row: Recipe, *, name: str, overwrite: bool = True) -> int:
    """Submit a save of weights and optimizer state under a name, replacing what has the name or failing at it."""
    body = requests.SaveWeights(
        model_id=row.run.public_id, path=name, seq_id=row.next_seq, overwrite=overwrite
    )
    return submit(row, Operation.Kind.SAVE_WEIGHTS, requests.canonical_json(body))


def automatic_name(step: int) -> str:
    """Return the name of the checkpoint that is saved after a step by itself."""
    return f"{AUTOMATIC}{step:06d}"


def saved_names(row: Recipe) -> set[str]:
    """Return the names of the training checkpoints that the recipe's run has, or will have once they are saved."""
    kind = Checkpoint.Kind.TRAINING
    # The waiting ones first: what is done in between has its checkpoint.
    waiting = {request["path"] for _, request in loads.waiting_saves(row.run_id, kind=kind)}
    return waiting | set(
        Checkpoint.objects.filter(run_id=row.run_id, kind=kind).values_list("name", flat=True)
    )


def note(row: Recipe, kind: str, **detail: Any) -> None:
    """Enter an event of the run at the step that is submitted next."""
    commits.add_event(row.run_id, seq=row.next_seq - 1, step=row.next_step, kind=kind, detail=detail)


def note_at(row: Recipe, step: int, kind: str, **detail: Any) -> None:
    """Enter an event of the run at a step."""
    commits.add_event(row.run_id, seq=row.next_seq - 1, step=step, kind=kind, detail=detail)


def _enter(row: Recipe, submission: Submission) -> int:
    operations.submit(row.run, submission)
    row.next_seq = submission.seq + 1
    return submission.seq
