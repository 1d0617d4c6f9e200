"""What holds a run up for a while and passes by itself: a full disk, a file that cannot be read just now.

Whoever meets it enters a sentence and tries again; who gets through clears it. One that nobody has met again for a
while is not shown any more, so a client or a worker that is gone leaves nothing behind.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from django.db import Error as DatabaseProblem
from django.db import transaction
from django.db.models import Case, Q, When
from django.db.models.functions import Now

from runs import events
from runs.exceptions import BaseModelAway, DiskFull, MintError, RateLimited
from runs.models import TrainingRun

# Longer than the longest pause between two tries: of the SDK, and of a worker (`gpuworker.seats.LONGEST_PUT_OFF_S`).
SHOWN_S: Final = 60
_ENTERED_AGAIN_S: Final = 10
NO_ROOM_FOR_REQUEST: Final = (
    "the server's disk is full, so a large operation cannot be stored; "
    "it is sent again until there is room, and nothing is lost"
)
NO_ROOM_FOR_STEP: Final = (
    "the server's disk is full, so the next step cannot be stored; "
    "it is tried again until there is room, and nothing is lost"
)
NO_TURN_FOR_STEP: Final = (
    "too many operations are waiting already, so the next step or sample is not entered yet; "
    "it is tried again until it can be, and nothing is lost"
)
NO_STORAGE_FOR_STEP: Final = (
    "the server cannot read or write its files just now, so the next step is not entered yet; "
    "it is tried again until it can be, and nothing is lost"
)
NO_DATABASE_FOR_STEP: Final = (
    "the database refuses the next step just now, so it is not entered yet; "
    "it is tried again until it can be, and nothing is lost"
)
OF_STEPS: Final = (NO_ROOM_FOR_STEP, NO_TURN_FOR_STEP, NO_STORAGE_FOR_STEP, NO_DATABASE_FOR_STEP)
# These follow what a worker or the settings say of it.
_ONCE_LOADED: Final = "; the run goes on by itself once a worker has loaded it, and nothing is lost"
_ONCE_SAVED: Final = "; the run's last checkpoint is tried again until it is saved, and nothing is lost"


class NotSaved(MintError):
    """a run's last checkpoint could not be saved just now"""


def reason_for_step(error: MintError | OSError | DatabaseProblem) -> str:
    """Return the sentence for a run whose next step, or end, met an error that passes."""
    if isinstance(error, DatabaseProblem):
        return NO_DATABASE_FOR_STEP
    if isinstance(error, BaseModelAway):
        return f"{error.message}{_ONCE_LOADED}"
    if isinstance(error, NotSaved):
        return f"{error.message}{_ONCE_SAVED}"
    if isinstance(error, DiskFull):
        return NO_ROOM_FOR_STEP
    return NO_TURN_FOR_STEP if isinstance(error, RateLimited) else NO_STORAGE_FOR_STEP


def is_of_step(reason: str) -> bool:
    """Say whether a run that gets on with its steps is no longer held up by this."""
    return reason in OF_STEPS or reason.endswith(_ONCE_LOADED)


def is_of_save(reason: str) -> bool:
    """Say whether a run whose last checkpoint is saved is no longer held up by this."""
    return reason.endswith(_ONCE_SAVED)


def put_off(problem: str) -> str:
    """Return the sentence for a run whose state a worker cannot bring back just now."""
    return f"{problem}; bringing the run back is tried again by itself, and nothing is lost"


def unread(problem: str) -> str:
    """Return the sentence for a run whose next operation a worker cannot read just now."""
    return f"{problem}; reading it is tried again by itself, and nothing is lost"


def enter(run_pk: int, reason: str) -> None:
    """Tell people why a run does not go on just now; again and again for as long as it lasts."""
    is_known = Q(held_up=reason, held_up_at__gt=Now() - timedelta(seconds=_ENTERED_AGAIN_S))
    _change(run_pk, ~is_known, held_up=reason, held_up_at=Now())


def clear(run_pk: int, reason: str) -> None:
    """Tell people that this does not hold the run up any more; another reason stays."""
    _change(run_pk, Q(held_up=reason), held_up="", held_up_at=None)


def is_held_up() -> Case:
    """Return whether a run of a query is held up now, as an expression that needs no look at other rows."""
    return Case(When(_is_shown(), then=True), default=False)


def reason_of(run: TrainingRun) -> str:
    """Return what holds the run up now; empty when nothing does."""
    shown = TrainingRun.objects.filter(_is_shown(), pk=run.pk).values_list("held_up", flat=True).first()
    return shown or ""


def _is_shown() -> Q:
    return ~Q(held_up="") & Q(held_up_at__gt=Now() - timedelta(seconds=SHOWN_S))


def _change(run_pk: int, condition: Q, **values: object) -> None:
    with transaction.atomic():
        run = TrainingRun.objects.filter(condition, pk=run_pk).first()
        if run is not None and TrainingRun.objects.filter(condition, pk=run_pk).update(**values):
            events.run_changed(run.pk, run.owner_id, run.public_id)
