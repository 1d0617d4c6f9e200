"""The operation log: everything a client asked for, in the order of its seq, with the answer.

The wire calls an operation a request or future. A row is written, payload and all, before the
client gets its `request_id`.
"""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now

from runs.models.accounts import User
from runs.models.checkpoints import SamplingSession
from runs.models.training_runs import TrainingRun
from runs.models.workers import Worker


class Operation(models.Model):
    """One operation on a run (ordered by seq) or of a sampling session (in any order).

    `loads_from` is the folder of weights that it reads, empty for most (see `services/loads.py`). The payload goes once no replay can need it, the result some time after that; a done one without a result
    was forgotten. `attempts` counts the workers that took it, `lone_attempts` those that tried it with nothing beside it.
    `sampled_run_pk` numbers the run that a sample keeps from going on: whose weights a client samples from. It is looked
    up and never followed, so the run may be gone.
    """

    class Kind(models.TextChoices):
        """What to do. SKIPPED marks a seq_id that the client reserved and never sent."""

        CREATE_MODEL = "create_model"
        FORWARD = "forward"
        FORWARD_BACKWARD = "forward_backward"
        OPTIM_STEP = "optim_step"
        SAVE_WEIGHTS = "save_weights"
        SAVE_WEIGHTS_FOR_SAMPLER = "save_weights_for_sampler"
        LOAD_WEIGHTS = "load_weights"
        RECORD_METRICS = "record_metrics"
        UNLOAD_MODEL = "unload_model"
        SAMPLE = "sample"
        SKIPPED = "skipped"

    class State(models.TextChoices):
        """`queued` becomes `done` or `failed` once, in one conditional UPDATE, and never changes again."""

        QUEUED = "queued"
        DONE = "done"
        FAILED = "failed"

    owner = models.ForeignKey(User, on_delete=models.CASCADE)
    run = models.ForeignKey(TrainingRun, null=True, on_delete=models.CASCADE, related_name="operations")
    sampling_session = models.ForeignKey(
        SamplingSession, null=True, on_delete=models.CASCADE, related_name="operations"
    )
    seq = models.BigIntegerField()
    kind = models.CharField(max_length=30, choices=Kind.choices)
    state = models.CharField(max_length=10, choices=State.choices, default=State.QUEUED)

    payload = models.BinaryField(null=True)
    payload_file = models.CharField(max_length=200, blank=True)
    payload_digest = models.CharField(max_length=64)
    num_tokens = models.PositiveIntegerField(default=0)
    loads_from = models.CharField(max_length=200, blank=True, db_default="")
    sampled_run_pk = models.BigIntegerField(null=True)

    result = models.BinaryField(null=True)
    result_is_proto = models.BooleanField(default=False)
    error = models.TextField(blank=True)
    error_category = models.CharField(max_length=10, blank=True)

    worker = models.ForeignKey(Worker, null=True, on_delete=models.SET_NULL)
    fence = models.BigIntegerField(default=0)
    attempts = models.PositiveIntegerField(default=0)
    lone_attempts = models.PositiveIntegerField(default=0)
    created_at = models.DateTimeField(db_default=Now())
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["run", "seq"], name="operation_once_per_run_seq"),
            models.UniqueConstraint(
                fields=["sampling_session", "seq"], name="operation_once_per_sampling_seq"
            ),
            models.CheckConstraint(
                condition=models.Q(run=None) ^ models.Q(sampling_session=None), name="operation_of_one_parent"
            ),
        ]
        indexes = [
            models.Index(fields=["run", "seq"], condition=models.Q(state="queued"), name="operation_queued"),
            models.Index(
                fields=["id"],
                condition=models.Q(state="queued", sampling_session__isnull=False),
                name="sample_queued",
            ),
            models.Index(
                fields=["owner", "id"],
                condition=models.Q(state="queued", sampling_session__isnull=False),
                name="sample_queued_of_owner",
            ),
            models.Index(
                fields=["sampling_session"],
                condition=models.Q(sampling_session__isnull=False)
                & ~models.Q(state="queued")
                & (
                    models.Q(payload__isnull=False)
                    | ~models.Q(payload_file="")
                    | models.Q(result__isnull=False)
                ),
                name="sample_kept",
            ),
            models.Index(
                fields=["loads_from"],
                opclasses=["varchar_pattern_ops"],
                condition=~models.Q(loads_from=""),
                name="operation_loads_from",
            ),
            models.Index(
                fields=["payload_file"], condition=~models.Q(payload_file=""), name="operation_payload_file"
            ),
            models.Index(
                fields=["sampled_run_pk", "finished_at"],
                condition=models.Q(sampled_run_pk__isnull=False),
                name="sample_of_run",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.kind}#{self.pk}"

    @property
    def request_id(self) -> str:
        """The id the client polls with."""
        return f"op-{self.pk}"
