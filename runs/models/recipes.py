"""Runs that need no code: a recipe's settings and how far it has come, its evaluations and fixed samples."""

from __future__ import annotations

from django.db import models
from django.db.models.functions import MD5, Now

from runs.models.datasets import DatasetVersion
from runs.models.operations import Operation
from runs.models.training_runs import TrainingRun


class Recipe(models.Model):
    """A server-side training loop and its place in it: everything a new process needs to go on.

    `next_step` and `next_seq` move in the transaction that enters the operations of a step into the
    log, by one compare-and-swap on `next_seq`: a loop that died, or a second one, repeats and skips
    nothing. `config` is what steering has made of `started_config`; a change holds from the next step
    that is submitted.
    """

    class State(models.TextChoices):
        """Where the loop stands; `services.recipes` alone changes it."""

        PREPARING = "preparing"
        QUEUED = "queued"
        RUNNING = "running"
        PAUSED = "paused"
        FINISHING = "finishing"
        STOPPING = "stopping"
        DISCARDING = "discarding"
        FINISHED = "finished"
        STOPPED = "stopped"
        DISCARDED = "discarded"
        FAILED = "failed"

    class HeldOutBy(models.TextChoices):
        """What decides which rows are held out: of runs from earlier versions and their forks, the seed."""

        SEED = "seed"
        CONTENT = "content"

    run = models.OneToOneField(TrainingRun, on_delete=models.CASCADE, related_name="recipe")
    name = models.CharField(max_length=40)
    config = models.JSONField()
    started_config = models.JSONField()
    dataset_version = models.ForeignKey(DatasetVersion, on_delete=models.PROTECT, related_name="recipes")
    validation_versions = models.ManyToManyField(DatasetVersion, related_name="validates")
    state = models.CharField(max_length=20, choices=State.choices, default=State.PREPARING)
    error = models.TextField(blank=True)
    preparation = models.JSONField(default=dict)
    progress = models.FloatField(default=0.0)
    first_step = models.PositiveIntegerField(default=0)
    data_step = models.PositiveIntegerField(db_default=0, default=0)
    data_row = models.PositiveBigIntegerField(db_default=0, default=0)
    held_out_by = models.CharField(
        max_length=10, choices=HeldOutBy.choices, db_default=HeldOutBy.SEED, default=HeldOutBy.CONTENT
    )
    next_step = models.PositiveIntegerField(default=0)
    num_steps = models.PositiveIntegerField(default=0)
    next_seq = models.PositiveBigIntegerField(default=1)
    watched_seq = models.BigIntegerField(default=0)
    best_step = models.PositiveIntegerField(null=True)
    queued_at = models.DateTimeField(db_default=Now())
    started_at = models.DateTimeField(null=True)
    ended_at = models.DateTimeField(null=True)

    class Meta:
        indexes = [
            models.Index(
                fields=["queued_at"],
                condition=models.Q(
                    state__in=["preparing", "queued", "running", "finishing", "stopping", "discarding"]
                ),
                name="recipe_active",
            ),
            models.Index(fields=["run"], condition=models.Q(state="paused"), name="recipe_paused"),
            models.Index(
                fields=["ended_at"],
                condition=models.Q(state__in=["finished", "stopped", "discarded", "failed"]),
                name="recipe_ended",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} of {self.run_id}"


class Evaluation(models.Model):
    """The validation loss of one dataset after a step; `loss` stays None until its forwards are done.

    `has_checkpoint`: the weights that were measured are saved too, so they may be the run's best.
    """

    run = models.ForeignKey(TrainingRun, on_delete=models.CASCADE, related_name="evaluations")
    step = models.PositiveIntegerField()
    label = models.CharField(max_length=40, blank=True)
    first_seq = models.BigIntegerField()
    last_seq = models.BigIntegerField()
    loss = models.FloatField(null=True)
    num_tokens = models.PositiveBigIntegerField(default=0)
    has_checkpoint = models.BooleanField(default=False)

    class Meta:
        ordering = ["step", "label"]
        constraints = [
            models.UniqueConstraint(fields=["run", "first_seq"], name="evaluation_once"),
        ]

    def __str__(self) -> str:
        return f"{self.label}@{self.step}"


class FixedSample(models.Model):
    """One of a run's fixed prompts, sampled after a step; without a step, from the bare base model.

    `save_seq` is the save whose weights it is drawn from; `operation` is the sample once it is asked for.
    """

    run = models.ForeignKey(TrainingRun, on_delete=models.CASCADE, related_name="fixed_samples")
    step = models.PositiveIntegerField(null=True)
    prompt = models.TextField()
    save_seq = models.BigIntegerField(null=True)
    operation = models.ForeignKey(Operation, null=True, on_delete=models.SET_NULL)
    error = models.TextField(blank=True)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ["step", "id"]
        constraints = [
            # Of the prompt's digest: a row of an index holds 2,704 bytes at most, a prompt 8,000 characters.
            models.UniqueConstraint(
                "run", "step", MD5("prompt"), nulls_distinct=False, name="fixed_sample_of_prompt"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.run_id}@{self.step}"
