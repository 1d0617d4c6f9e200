"""Which runs use a dataset: those that train on it and those that are measured on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from django.db.models import Count, F

from runs.models import Dataset, DatasetVersion, Recipe, TrainingRun

_Measured: Final = Recipe.validation_versions.through


def is_used(version: DatasetVersion) -> bool:
    """Say whether a run uses this version, so that its rows have to stay as they are."""
    return version.recipes.exists() or version.validates.exists()


def users_of(dataset: Dataset, *, limit: int) -> list[TrainingRun]:
    """Return the newest runs that train on the dataset or are measured on it."""
    trained = Recipe.objects.filter(dataset_version__dataset=dataset)
    measured = _Measured.objects.filter(datasetversion__dataset=dataset)
    # A union, not an OR: for that the database would look at every run there is.
    users = trained.values("run").union(measured.values("recipe__run"))
    return list(TrainingRun.objects.filter(pk__in=users).order_by("-created_at", "-pk")[:limit])


def num_users(dataset_pks: Sequence[int]) -> dict[int, int]:
    """Return how many runs train on each of these datasets or are measured on it; the database counts."""
    trained = Recipe.objects.filter(dataset_version__dataset__in=dataset_pks)
    trained_on = trained.values_list("dataset_version__dataset").annotate(num=Count("pk"))
    measured = _Measured.objects.filter(datasetversion__dataset__in=dataset_pks)
    # A run that trains on the dataset, too, is counted already.
    others = measured.exclude(recipe__dataset_version__dataset=F("datasetversion__dataset"))
    measured_on = others.values_list("datasetversion__dataset").annotate(num=Count("recipe", distinct=True))
    counts = Counter(dict(trained_on)) + Counter(dict(measured_on))
    return {pk: counts[pk] for pk in dataset_pks}
