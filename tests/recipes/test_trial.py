"""Try it: one call makes the example, checks it and starts a run whose answers visibly change."""

from __future__ import annotations

import time

import pytest

from runs.models import Dataset, DatasetVersion, FixedSample, Metric, Recipe, User
from runs.recipes import rendering, trial
from runs.schemas import results
from runs.services import dataset_checks, recipe_status
from runs.services.recipe_rows import State
from tests.recipes.conftest import BASE_MODEL, Staff, ended


def answers(recipe: Recipe, step: int | None) -> list[str]:
    renderer = rendering.renderer_of(BASE_MODEL)
    texts = []
    for sample in FixedSample.objects.filter(run=recipe.run, step=step).select_related("operation"):
        assert sample.operation is not None and sample.operation.result is not None
        (sequence,) = results.decode_sample(bytes(sample.operation.result)).sequences
        texts.append(renderer.decode(sequence.tokens))
    return texts


def test_it_ends_soon_with_the_answers_of_a_pirate(worker: Staff, alice: User) -> None:
    began = time.monotonic()
    recipe = Recipe.objects.get(run=trial.start(alice))
    recipe = ended(recipe)
    print("took", time.monotonic() - began)
    for step in [None, *range(12, 121, 12)]:
        print(step, answers(recipe, step))
    print(list(Metric.objects.filter(run=recipe.run, name="validation_loss").values_list("step", "value")))
    print(list(Metric.objects.filter(run=recipe.run, name="loss").values_list("step", "value"))[::10])

    assert (recipe.state, recipe.error) == (State.FINISHED, "")
