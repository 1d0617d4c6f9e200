"""What a run leaves behind: checkpoints people name, snapshots the system needs, and sampling sessions."""

from __future__ import annotations

from typing import Final

from django.db import models
from django.db.models.functions import Now

from runs.models.accounts import Session, User
from runs.models.training_runs import TrainingRun

# Lists of a person's checkpoints read an index in its order, either way, and never sort.
_LISTED_BY: Final = (
    ("-created_at", "-id", "checkpoint_by_age"),
    ("name", "id", "checkpoint_by_name"),
    ("step", "id", "checkpoint_by_step"),
    ("size_bytes", "id", "checkpoint_by_size"),
)


class Checkpoint(models.Model):
    """Saved weights. The row appears in the same commit as the operation that made it.

    `directory` is a storage prefix built from an id, never from the user's name for it.
    An ephemeral checkpoint has no name of the user's: it feeds one sampling session, and is there before its
    file is; until then its size is 0 (see `services/early_answers.py`).
    """

    class Kind(models.TextChoices):
        """The values are the middle part of a tinker:// path."""

        TRAINING = "weights", "training"
        SAMPLER = "sampler_weights", "sampler"

    owner = models.ForeignKey(User, on_delete=models.CASCADE, related_name="checkpoints")
    run = models.ForeignKey(TrainingRun, on_delete=models.CASCADE, related_name="checkpoints")
    kind = models.CharField(max_length=20, choices=Kind.choices)
    name = models.CharField(max_length=128)
    is_ephemeral = models.BooleanField(default=False)
    directory = models.CharField(max_length=200)
    size_bytes = models.PositiveBigIntegerField()
    seq = models.BigIntegerField()
    step = models.PositiveBigIntegerField()
    is_public = models.BooleanField(default=False)
    user_metadata = models.JSONField(default=dict)
    created_at = models.DateTimeField(db_default=Now())
    expires_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ["-created_at", "-id"]
        constraints = [
            models.UniqueConstraint(fields=["run", "kind", "name"], name="checkpoint_name_once_per_run"),
        ]
        indexes = [
            *(
                models.Index(
                    fields=["owner", column, direction], condition=models.Q(is_ephemeral=False), name=name
                )
                for column, direction, name in _LISTED_BY
            ),
            models.Index(
                fields=["owner", "kind", "-created_at", "-id"],
                condition=models.Q(is_ephemeral=False),
                name="checkpoint_by_kind",
            ),
            models.Index(fields=["run", "-created_at", "-id"], name="checkpoint_of_run"),
            models.Index(
                fields=["run", "size_bytes", "id"],
                condition=models.Q(is_ephemeral=False),
                name="checkpoint_of_run_by_size",
            ),
            models.Index(
                fields=["run", "seq"], condition=models.Q(is_ephemeral=True), name="checkpoint_ephemeral"
            ),
            models.Index(
                fields=["run"],
                condition=models.Q(is_ephemeral=True, size_bytes=0),
                name="checkpoint_owed",
            ),
            models.Index(
                fields=["expires_at"],
                condition=models.Q(expires_at__isnull=False),
                name="checkpoint_expiring",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.run_id}/{self.kind}/{self.name}"


class SamplingSession(models.Model):
    """A fixed set of weights to sample from: a checkpoint's, or the bare base model's."""

    public_id = models.CharField(max_length=128, unique=True)
    owner = models.ForeignKey(User, on_delete=models.CASCADE, related_name="sampling_sessions")
    session = models.ForeignKey(Session, on_delete=models.CASCADE, related_name="sampling_sessions")
    seq_id = models.PositiveBigIntegerField()
    base_model = models.CharField(max_length=200)
    checkpoint = models.ForeignKey(Checkpoint, null=True, on_delete=models.SET_NULL)
    run = models.ForeignKey(
        TrainingRun, null=True, on_delete=models.SET_NULL, related_name="sampling_sessions"
    )
    model_path = models.CharField(max_length=400, blank=True)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["session", "seq_id"], name="sampling_session_once_per_session_seq"
            ),
        ]

    def __str__(self) -> str:
        return self.public_id


class Snapshot(models.Model):
    """The full state of a run after `seq`: where a worker that takes over starts to replay."""

    run = models.ForeignKey(TrainingRun, on_delete=models.CASCADE, related_name="snapshots")
    seq = models.BigIntegerField()
    fence = models.BigIntegerField()
    directory = models.CharField(max_length=200)
    size_bytes = models.PositiveBigIntegerField()
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ["-seq"]
        constraints = [models.UniqueConstraint(fields=["run", "seq", "fence"], name="snapshot_once")]

    def __str__(self) -> str:
        return f"{self.run_id}@{self.seq}"
