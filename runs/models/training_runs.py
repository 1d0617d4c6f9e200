"""Training runs (one LoRA adapter each), their metrics and the events of their life."""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Coalesce, Now

from runs.models.accounts import Session, User
from runs.models.workers import Worker


class TrainingRun(models.Model):
    """One LoRA adapter being trained; the wire calls it a model and its public id `model_id`.

    `fence` and `applied_seq` carry the safety of the whole product: every commit is one
    compare-and-swap on both, so the applied operations form one chain (see `services.commits`).
    A fork names the run, its step and seq, and the checkpoint it started from; it `continues_parent` if it took
    over the optimizer's state. `num_to_replay` is above 0 while a worker that took the run over brings it back;
    `lost_at` is its former worker's last sign of life, from when that worker was lost until the run is back;
    `free_since` is when a worker last let it go. `restore_tries` workers in a row were lost while they brought it
    back; with too many of them no worker takes it until `rests_until`. `held_up` says what keeps it from going on
    for now, and `held_up_at` when somebody last met that. Payloads and results of operations up to
    `payloads_gone_seq` and `results_gone_seq` were deleted.
    """

    class Source(models.TextChoices):
        """Where the run was made."""

        SDK = "sdk", "SDK"
        BROWSER = "browser", "Browser"
        REST = "rest", "REST"

    class State(models.TextChoices):
        """A run is open until its client closes it or the creation fails."""

        OPEN = "open", "open"
        CLOSED = "closed", "closed"
        FAILED = "failed", "failed"

    public_id = models.CharField(max_length=128, unique=True)
    owner = models.ForeignKey(User, on_delete=models.CASCADE, related_name="training_runs")
    session = models.ForeignKey(Session, on_delete=models.CASCADE, related_name="training_runs")
    model_seq_id = models.PositiveIntegerField()
    name = models.CharField(max_length=200, blank=True)
    source = models.CharField(max_length=10, choices=Source.choices, default=Source.SDK)
    state = models.CharField(max_length=10, choices=State.choices, default=State.OPEN)
    error = models.TextField(blank=True)
    user_metadata = models.JSONField(default=dict)
    created_at = models.DateTimeField(db_default=Now())

    base_model = models.CharField(max_length=200)
    lora_rank = models.PositiveIntegerField()
    lora_alpha = models.FloatField()
    lora_seed = models.BigIntegerField()
    train_attn = models.BooleanField()
    train_mlp = models.BooleanField()
    train_unembed = models.BooleanField()

    worker = models.ForeignKey(Worker, null=True, on_delete=models.SET_NULL, related_name="training_runs")
    fence = models.BigIntegerField(default=0)
    applied_seq = models.BigIntegerField(default=-1)
    num_replayed = models.PositiveIntegerField(default=0)
    num_to_replay = models.PositiveIntegerField(default=0)
    lost_at = models.DateTimeField(null=True)
    free_since = models.DateTimeField(null=True)
    restore_tries = models.PositiveIntegerField(default=0, db_default=0)
    rests_until = models.DateTimeField(null=True)
    held_up = models.TextField(blank=True, db_default="")
    held_up_at = models.DateTimeField(null=True)

    payloads_gone_seq = models.BigIntegerField(default=-1)
    results_gone_seq = models.BigIntegerField(default=-1)

    parent = models.ForeignKey("self", null=True, on_delete=models.SET_NULL, related_name="forks")
    parent_step = models.PositiveBigIntegerField(null=True)
    parent_seq = models.BigIntegerField(null=True)
    parent_path = models.CharField(max_length=400, blank=True)
    continues_parent = models.BooleanField(default=False, db_default=False)

    step = models.PositiveBigIntegerField(default=0)
    num_tokens = models.PositiveBigIntegerField(default=0)
    loss = models.FloatField(null=True)
    tokens_per_s = models.FloatField(null=True)
    last_applied_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ["-created_at", "-id"]
        constraints = [
            models.UniqueConstraint(fields=["session", "model_seq_id"], name="run_once_per_session_seq"),
        ]
        indexes = [
            models.Index(fields=["owner", "-created_at"], name="run_by_owner"),
            # The start page reads it in its order; see `services/run_rows.py: by_activity`.
            models.Index(
                models.F("owner"),
                Coalesce("last_applied_at", "created_at").desc(),
                models.F("id").desc(),
                name="run_by_activity",
            ),
        ]

    def __str__(self) -> str:
        return self.public_id


class Metric(models.Model):
    """One value of one named metric, made by the operation with this seq.

    `seq` is the cursor of live charts: within a run rows become visible in seq order, since each
    commit holds the run's row. Double precision keeps NaN and infinities as they are.
    """

    pk = models.CompositePrimaryKey("run_id", "seq", "name")
    # Found by the primary key and by `metric_series`, which begin with it.
    run = models.ForeignKey(TrainingRun, on_delete=models.CASCADE, related_name="metrics", db_index=False)
    seq = models.BigIntegerField()
    name = models.CharField(max_length=64)
    step = models.BigIntegerField()
    value = models.FloatField()
    recorded_at = models.DateTimeField(db_default=Now())

    class Meta:
        indexes = [models.Index(fields=["run", "name", "seq"], name="metric_series")]

    def __str__(self) -> str:
        return f"{self.name}@{self.seq}"


class RunEvent(models.Model):
    """Something a person should see on the run's chart: recovered, diverged, saved, stopped."""

    run = models.ForeignKey(TrainingRun, on_delete=models.CASCADE, related_name="events")
    seq = models.BigIntegerField()
    step = models.BigIntegerField(default=0)
    kind = models.CharField(max_length=40)
    detail = models.JSONField(default=dict)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ["id"]
        indexes = [models.Index(fields=["run"], condition=models.Q(kind="diverged"), name="run_diverged")]

    def __str__(self) -> str:
        return f"{self.kind}@{self.seq}"
