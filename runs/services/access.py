"""The only way from a person and an id to a row. Missing and not yours look the same."""

from __future__ import annotations

from typing import TypeVar

from django.db.models import Model, Q, QuerySet

from runs import ids
from runs.exceptions import NotFound, SessionFinished
from runs.models import ApiKey, Checkpoint, Operation, SamplingSession, Session, TrainingRun, User
from runs.services import keys

Row = TypeVar("Row", bound=Model)


def runs_of(user: User) -> QuerySet[TrainingRun]:
    """Return the user's runs, newest first."""
    return TrainingRun.objects.filter(owner=user)


def checkpoints_of(user: User) -> QuerySet[Checkpoint]:
    """Return the checkpoints the user named, newest first."""
    return Checkpoint.objects.filter(owner=user, is_ephemeral=False).select_related("run")


def keys_of(user: User) -> QuerySet[ApiKey]:
    """Return the user's API keys, newest first."""
    return ApiKey.objects.filter(owner=user)


def sessions_of(user: User) -> QuerySet[Session]:
    """Return the user's SDK sessions that made a run or a sampling session, newest first."""
    return (
        Session.objects.filter(owner=user)
        .filter(Q(training_runs__isnull=False) | Q(sampling_sessions__isnull=False))
        .distinct()
        .order_by("-created_at")
    )


def get_run(user: User, run_id: str) -> TrainingRun:
    """Return the user's run.

    Raises:
        NotFound: there is none, or it is not the user's.
    """
    return _one(TrainingRun.objects.filter(public_id=run_id, owner=user), f"training run {run_id[:128]!r}")


def get_session(user: User, session_id: str) -> Session:
    """Return the user's SDK session, open or not."""
    return _one(Session.objects.filter(public_id=session_id, owner=user), f"session {session_id[:64]!r}")


def get_open_session(user: User, session_id: str) -> Session:
    """Return the user's SDK session for new work.

    Raises:
        NotFound: there is none, or it is not the user's.
        SessionFinished: the client closed it.
    """
    session = get_session(user, session_id)
    if session.finished_at is not None:
        raise SessionFinished
    return session


def get_operation(user: User, pk: int) -> Operation:
    """Return the user's operation without its payload."""
    return _one(Operation.objects.filter(pk=pk, owner=user).defer("payload"), f"request op-{pk}")


def get_sampling_session(user: User, sampling_session_id: str) -> SamplingSession:
    """Return the user's sampling session."""
    rows = SamplingSession.objects.filter(public_id=sampling_session_id, owner=user).select_related(
        "checkpoint"
    )
    return _one(rows, f"sampling session {sampling_session_id[:128]!r}")


def get_checkpoint(user: User, path: ids.CheckpointPath) -> Checkpoint:
    """Return the user's checkpoint for changing or deleting it."""
    rows = Checkpoint.objects.filter(
        owner=user, run__public_id=path.run_id, kind=path.kind, name=path.name, is_ephemeral=False
    ).select_related("run")
    return _one(rows, f"checkpoint {str(path)[:300]!r}")


def get_readable_checkpoint(user: User, path: ids.CheckpointPath) -> Checkpoint:
    """Return a checkpoint the user may read: their own, or one that its owner published."""
    rows = Checkpoint.objects.filter(
        Q(owner=user) | Q(is_public=True),
        run__public_id=path.run_id,
        kind=path.kind,
        name=path.name,
        is_ephemeral=False,
    ).select_related("run")
    return _one(rows, f"checkpoint {str(path)[:300]!r}")


def get_readable_checkpoint_for(user: User, path: ids.CheckpointPath, *, token: str | None) -> Checkpoint:
    """Return a checkpoint that the user may read, or whoever's key the token is."""
    return get_readable_checkpoint(user if token is None else keys.authenticate(token), path)


def _one(rows: QuerySet[Row], what: str) -> Row:
    row = rows.first()
    if row is None:
        raise NotFound(f"there is no {what}")
    return row
