"""Which recipes the loop of `runs.recipes` has to look after in a turn: one that rests only while something is left."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from django.db.models import Exists, F, OuterRef, Q
from django.db.models.functions import Now

from runs.models import Checkpoint, Evaluation, FixedSample, Recipe
from runs.services import holdups, recipe_rows
from runs.services.recipe_rows import State

# How long after its end a recipe may have weights left that samples were to be drawn from.
_LEFT_FOR: Final = timedelta(days=7)


def find() -> list[Recipe]:
    """Return the recipes that the loop has to look after, those that wait longest first.

    Each kind by an index of its own: together they would be looked for among all recipes, many times a second.
    """
    rows = Recipe.objects.values("pk")
    active = rows.filter(state__in=recipe_rows.ACTIVE)
    behind = rows.filter(_has_left(), state=State.PAUSED).exclude(run__applied_seq=-1)
    ended = rows.filter(_has_sampled_weights(), state__in=recipe_rows.ENDED, ended_at__gt=Now() - _LEFT_FOR)
    return list(
        Recipe.objects.filter(pk__in=active.union(behind, ended, all=True))
        .select_related("run__session", "dataset_version__dataset")
        .defer("dataset_version__report")
        .order_by("queued_at", "pk")
    )


def _has_left() -> Q:
    """Return whether a recipe that submits no step has results to look at, or samples and weights to see to."""
    of_run = {"run_id": OuterRef("run_id")}
    applied_seq = OuterRef("run__applied_seq")
    unasked = Q(save_seq=None) | Q(save_seq__lte=applied_seq)
    return (
        Q(watched_seq__lt=F("run__applied_seq"))
        | Q(run__held_up__in=holdups.OF_STEPS)
        | Q(Exists(Evaluation.objects.filter(**of_run, loss=None, last_seq__lte=applied_seq)))
        | Q(Exists(FixedSample.objects.filter(unasked, **of_run, operation=None, error="")))
        | _has_sampled_weights()
    )


def _has_sampled_weights() -> Q:
    """Return whether weights are there that were saved for samples only (see `recipe_samples.drop_weights`)."""
    saved = Checkpoint.objects.filter(run_id=OuterRef("run_id"), is_ephemeral=True)
    return Q(Exists(saved.filter(seq__lt=OuterRef("next_seq"))))
