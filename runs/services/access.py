"""The only way from a person and an id to a row. Missing and not yours look the same."""

from __future__ import annotations

from typing import TypeVar

from django.db.models import Exists, Model, OuterRef, Q, QuerySet

from runs import ids
from runs.exceptions import NotFound, OperatorsOnly, SessionFinished
from runs.models import (
    ApiKey,
    Checkpoint,
    Dataset,
    DatasetVersion,
    Operation,
    Recipe,
    SamplingSession,
    Session,
    TrainingRun,
    Upload,
    User,
    Webhook,
    Worker,
)
from runs.services import keys, workers

Row = TypeVar("Row", bound=Model)


def check_operator(user: User) -> None:
    """Refuse whoever may not steer what all people share.

    Raises:
        OperatorsOnly: the account has no staff rights.
    """
    # By the row: a key's owner is remembered for some seconds, and rights that were taken away are gone at once.
    if not User.objects.filter(pk=user.pk, is_active=True, is_staff=True).exists():
        raise OperatorsOnly


def get_worker(user: User, pk: int) -> Worker:
    """Return a worker for an operator, as `workers.with_state` gives it."""
    check_operator(user)
    return _one(workers.with_state().filter(pk=pk), f"worker {pk}")


def runs_of(user: User) -> QuerySet[TrainingRun]:
    """Return the user's runs, newest first."""
    return TrainingRun.objects.filter(owner=user)


def checkpoints_of(user: User) -> QuerySet[Checkpoint]:
    """Return the checkpoints the user named, newest first."""
    return Checkpoint.objects.filter(owner=user, is_ephemeral=False).select_related("run")


def datasets_of(user: User) -> QuerySet[Dataset]:
    """Return the user's datasets, newest first."""
    return Dataset.objects.filter(owner=user)


def get_dataset(user: User, dataset_id: str) -> Dataset:
    """Return the user's dataset."""
    return _one(datasets_of(user).filter(public_id=dataset_id), f"dataset {dataset_id[:40]!r}")


def get_dataset_version(user: User, dataset_id: str, number: int) -> DatasetVersion:
    """Return a version of the user's dataset."""
    rows = DatasetVersion.objects.filter(dataset__owner=user, dataset__public_id=dataset_id, number=number)
    return _one(rows.select_related("dataset"), f"version {number} of dataset {dataset_id[:40]!r}")


def uploads_of(user: User) -> QuerySet[Upload]:
    """Return the user's uploads, finished or not, newest first."""
    return Upload.objects.filter(owner=user).order_by("-created_at")


def get_upload(user: User, upload_id: str) -> Upload:
    """Return the user's upload, finished or not."""
    return _one(Upload.objects.filter(owner=user, public_id=upload_id), f"upload {upload_id[:40]!r}")


def webhooks_of(user: User) -> QuerySet[Webhook]:
    """Return the user's webhooks, newest first."""
    return Webhook.objects.filter(owner=user)


def get_webhook(user: User, webhook_id: str) -> Webhook:
    """Return the user's webhook."""
    return _one(webhooks_of(user).filter(public_id=webhook_id), f"webhook {webhook_id[:40]!r}")


def keys_of(user: User) -> QuerySet[ApiKey]:
    """Return the user's API keys, newest first."""
    return ApiKey.objects.filter(owner=user)


def sessions_of(user: User) -> QuerySet[Session]:
    """Return the user's SDK sessions that made a run or a sampling session, newest first."""
    # Not by joins: of a session with many of both they make a row for each pair.
    runs = TrainingRun.objects.filter(session=OuterRef("pk"))
    sampling = SamplingSession.objects.filter(session=OuterRef("pk"))
    return Session.objects.filter(Exists(runs) | Exists(sampling), owner=user).order_by("-created_at")


def get_run(user: User, run_id: str) -> TrainingRun:
    """Return the user's run.

    Raises:
        NotFound: there is none, or it is not the user's.
    """
    rows = TrainingRun.objects.filter(public_id=run_id, owner=user).select_related("session")
    return _one(rows, f"training run {run_id[:128]!r}")


def recipes_of(user: User) -> QuerySet[Recipe]:
    """Return what trains the user's runs that need no code."""
    return Recipe.objects.filter(run__owner=user)


def get_recipe(user: User, run_id: str) -> Recipe:
    """Return what trains the user's run; a run whose client trains it has none."""
    rows = recipes_of(user).filter(run__public_id=run_id).select_related("run")
    return _one(rows, f"training run {run_id[:128]!r} with a recipe")


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


def get_readable_sampling_session(user: User, sampling_session_id: str) -> SamplingSession:
    """Return the user's sampling session for a new sample.

    Raises:
        NotFound: there is none, or its checkpoint is somebody else's who has taken it back.
    """
    session = get_sampling_session(user, sampling_session_id)
    checkpoint = session.checkpoint
    if checkpoint is not None and checkpoint.owner_id != user.pk and not checkpoint.is_public:
        raise NotFound(f"there is no checkpoint {session.model_path!r}")
    return session


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


def lock(row: Model) -> None:
    """Let nobody else lock or change a row until the transaction ends; what is read of it from now on stands.

    Raises:
        NotFound: it was deleted meanwhile.
    """
    rows = type(row)._base_manager.filter(pk=row.pk).select_for_update(no_key=True)
    if not rows.values_list("pk"):
        raise NotFound


def _one(rows: QuerySet[Row], what: str) -> Row:
    row = rows.first()
    if row is None:
        raise NotFound(f"there is no {what}")
    return row
