"""Try it: one call makes the example, checks it and starts a run whose answers visibly change."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs.exceptions import RequestInvalid
from runs.models import Dataset, DatasetVersion, FixedSample, Metric, Recipe, User
from runs.recipes import rendering, trial
from runs.schemas import results
from runs.services import datasets
from runs.services.recipe_rows import State
from tests.recipes.conftest import BASE_MODEL, Staff, ended

LONGEST_S = 300


def answers(recipe: Recipe, step: int | None) -> dict[str, str]:
    """Return prompt -> answer, of the base model (no step) or after a step."""
    renderer = rendering.renderer_of(BASE_MODEL)
    texts = {}
    for sample in FixedSample.objects.filter(run=recipe.run, step=step).select_related("operation"):
        assert sample.operation is not None
        assert sample.operation.result is not None
        (sequence,) = results.decode_sample(bytes(sample.operation.result)).sequences
        texts[sample.prompt] = renderer.decode([int(token) for token in sequence.tokens])
    return texts


@pytest.mark.timeout(LONGEST_S + 60)
def test_it_ends_soon_with_the_answers_of_a_pirate(worker: Staff, alice: User) -> None:
    recipe = ended(Recipe.objects.get(run=trial.start(alice)), deadline_s=LONGEST_S)

    assert (recipe.state, recipe.error) == (State.FINISHED, "")
    before, after = answers(recipe, None), answers(recipe, recipe.num_steps)
    assert set(before) == set(after) == set(trial.PROMPTS)
    for prompt in trial.PROMPTS:
        assert "Arr!" not in before[prompt], before
        assert "hearty" not in before[prompt], before
        assert after[prompt].startswith("Arr!"), after
        assert "me hearty!" in after[prompt], after
    # What the base model knows is still there.
    assert "woof" in after["What does a dog say?"]
    assert "15" in after["What is 6 + 9?"]
    losses = Metric.objects.filter(run=recipe.run, name="validation_loss").order_by("step")
    first, *_, last = losses.values_list("value", flat=True)
    assert last < first / 4


def test_it_has_its_example_ready_at_once_and_makes_it_once(alice: User, base_model: str) -> None:
    runs = [trial.start(alice), trial.start(alice)]

    dataset = Dataset.objects.get(owner=alice)
    version = dataset.versions.get()
    assert version.state == DatasetVersion.State.READY
    assert [run.recipe.dataset_version_id for run in runs] == [version.pk] * 2
    assert {(run.name, run.source, run.base_model) for run in runs} == {(trial.NAME, "browser", BASE_MODEL)}


def test_it_waits_for_no_other_check(alice: User, base_model: str, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"text": "of somebody who came first"}\n')
    other = datasets.create_version(alice, path=path, filename=path.name)
    assert trial.start(alice).recipe.dataset_version != other
    other.refresh_from_db()
    assert other.state == DatasetVersion.State.CHECKING


def test_it_says_why_the_example_cannot_be_used(alice: User, base_model: str) -> None:
    trial.start(alice)
    DatasetVersion.objects.update(state=DatasetVersion.State.FAILED, error="the file is gone")
    with pytest.raises(
        RequestInvalid, match=r"the example dataset is not ready: the file is gone; try again"
    ):
        trial.start(alice)
    assert Recipe.objects.count() == 1
