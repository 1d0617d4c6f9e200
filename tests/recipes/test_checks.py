"""What settings are refused for, against the data that is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from runs.exceptions import RequestInvalid
from runs.models import Checkpoint, DatasetVersion, Recipe, TrainingRun, User
from runs.schemas.recipes import Changes, SftConfig
from runs.services import datasets, recipe_checks, recipes
from runs.services.recipe_rows import State
from tests.pages import recipe_seed, seed
from tests.recipes.conftest import questions

Add = Callable[..., DatasetVersion]
BLIND = (
    "3 needs a validation loss; set validation.share above 0 or name validation.datasets "
    "(datasets under 20 rows are not split)"
)


def problems(user: User, version: DatasetVersion, **values: Any) -> list[tuple[str, str]]:
    """Return what is wrong with settings of a run on a dataset."""
    given = {"base_model": "mintweb/tiny", "dataset": recipe_checks.ref_of(version), **values}
    return list(recipe_checks.check(user, given).problems)


def same_content(user: User, version: DatasetVersion, tmp_path: Any) -> DatasetVersion:
    """Return the version's content as one of another dataset."""
    other = datasets.create_version(user, path=_file(tmp_path, b"{}\n"), filename="other.jsonl")
    DatasetVersion.objects.filter(pk=other.pk).update(
        digest=version.digest, state=version.state, kind=version.kind, num_rows=version.num_rows
    )
    return other


def _file(folder: Any, content: bytes) -> Any:
    path = folder / "other.jsonl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("num_rows", "validation", "is_refused"),
    [
        (40, {"share": 0}, True),
        (19, {"share": 0.1}, True),
        (40, {"share": 0.1}, False),
        (40, {}, False),
        (19, {"share": 0, "datasets": True}, False),
    ],
)
def test_early_stopping_needs_something_to_measure(
    alice: User,
    base_model: str,
    add_dataset: Add,
    num_rows: int,
    validation: dict[str, Any],
    is_refused: bool,
) -> None:
    version = add_dataset(questions(num_rows))
    if "datasets" in validation:
        other = add_dataset(questions(5, start=500), name="other")
        validation = {**validation, "datasets": [other.dataset.public_id]}

    found = problems(alice, version, early_stopping=3, validation=validation)

    assert found == ([("early_stopping", BLIND)] if is_refused else [])
    assert problems(alice, version, validation=validation) == []


def test_early_stopping_is_not_judged_by_a_validation_that_is_wrong(
    alice: User, base_model: str, add_dataset: Add
) -> None:
    validation = {"share": 0, "datasets": ["nothing"]}
    found = problems(alice, add_dataset(questions(40)), early_stopping=3, validation=validation)
    assert [place for place, _ in found] == ["validation.datasets[0]"]


@pytest.mark.parametrize("num_rows", [0, 57])
def test_early_stopping_is_not_switched_on_where_nothing_is_measured(alice: User, num_rows: int) -> None:
    recipe = recipe_seed.make_recipe(
        seed.make_run(alice), preparation={"num_rows": 1140, "num_validation_rows": num_rows}
    )
    if num_rows:
        recipes.change(recipe, Changes(early_stopping=3))
        return
    with pytest.raises(RequestInvalid, match="3 needs a validation loss, and this run measures none"):
        recipes.change(recipe, Changes(early_stopping=3))


def test_a_dataset_does_not_validate_itself(
    alice: User, base_model: str, add_dataset: Add, tmp_path: Any
) -> None:
    version = add_dataset(questions(40))
    same, copy = recipe_checks.ref_of(version), same_content(alice, version, tmp_path)
    other = add_dataset(questions(5, start=500), name="other")
    names = [other.dataset.public_id, version.dataset.public_id, recipe_checks.ref_of(copy)]

    found = problems(alice, version, validation={"share": 0.1, "datasets": names})

    assert found == [
        ("validation.datasets[1]", f"{names[1]} is {same}, which the run trains on; choose other rows"),
        (
            "validation.datasets[2]",
            f"{names[2]} has the same content as {same}, which the run trains on; choose other rows",
        ),
    ]


@pytest.fixture
def recipe(alice: User, base_model: str) -> Recipe:
    """Return what trains a run of 30 steps."""
    run = seed.make_run(alice, base_model=base_model, step=30)
    recipe = recipe_seed.make_recipe(run)
    samples = {"prompts": ["One?"], "every": 40, "max_tokens": 12, "temperature": 0.5, "seed": 3}
    Recipe.objects.filter(pk=recipe.pk).update(config={**recipe.config, "samples": samples})
    recipe.refresh_from_db()
    return recipe


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"every": 50}, {"every": 50}),
        ({"every": None, "max_tokens": 8}, {"every": None, "max_tokens": 8}),
        ({"prompts": ["Two?"]}, {"prompts": ["Two?"]}),
        ({"prompts": []}, {"prompts": []}),
    ],
)
def test_a_change_of_one_part_leaves_the_others(
    recipe: Recipe, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    held = recipe.config["samples"]
    recipes.change(recipe, Changes.model_validate({"samples": given}))
    assert recipe.config["samples"] == {**held, **expected}
    assert recipe.run.events.get(kind="changed").detail == {
        "samples": f"{ {name: held[name] for name in given} } to {given}"
    }


def test_a_part_that_stays_the_same_is_no_change(recipe: Recipe) -> None:
    with pytest.raises(RequestInvalid, match="nothing to change"):
        recipes.change(recipe, Changes.model_validate({"samples": {"every": 40}}))


def test_the_base_model_answers_a_prompt_that_is_added(recipe: Recipe) -> None:
    asked = recipe.run.fixed_samples.filter(step=None)
    for state, started_at, expected in (
        (State.PREPARING, None, set()),  # its first step asks for those that are there by then
        (State.RUNNING, recipe.started_at, {"Two?", "Three?"}),
    ):
        Recipe.objects.filter(pk=recipe.pk).update(state=state, started_at=started_at)
        prompts = [f"{state}?", "Two?", "Three?"] if started_at is None else ["Two?", "Three?"]
        recipes.change(recipe, Changes.model_validate({"samples": {"prompts": prompts}}))
        assert set(asked.values_list("prompt", flat=True)) == expected


@pytest.fixture
def checkpoint(recipe: Recipe) -> Checkpoint:
    """Return a checkpoint of the run."""
    return seed.add_checkpoint(recipe.run, "step-000020", step=20)


def fork(user: User, checkpoint: Checkpoint, **changes: Any) -> SftConfig:
    run = recipes.fork(user, checkpoint, with_optimizer=False, changes=changes, source="rest")
    return SftConfig.model_validate(Recipe.objects.get(run=run).config)


def test_a_fork_keeps_the_parts_that_are_not_changed(
    alice: User, recipe: Recipe, checkpoint: Checkpoint
) -> None:
    config = fork(alice, checkpoint, samples={"every": 50}, validation={"max_rows": 9}, lora={"rank": 16})
    assert (config.samples.prompts, config.samples.every, config.samples.max_tokens) == (["One?"], 50, 12)
    assert (config.validation.share, config.validation.max_rows) == (0.05, 9)
    assert config.lora.rank == 16
    assert config.lora.train_unembed is True


@pytest.mark.parametrize(
    ("changes", "place", "message"),
    [
        ({"lora": {"rank": 8}}, "lora.rank", "8 is not 16, which the checkpoint has and a fork keeps"),
        ({"lora": {"train_mlp": False}}, "lora.train_mlp", "false is not true, which the"),
        ({"base_model": "other"}, "base_model", "'other' is not 'mintweb/tiny', which the"),
        ({"lora": {"size": 8}}, "lora.size", ""),
        ({"lora": None}, "lora", ""),
    ],
)
def test_a_fork_keeps_the_shape_of_its_checkpoint(
    alice: User, checkpoint: Checkpoint, changes: dict[str, Any], place: str, message: str
) -> None:
    with pytest.raises(RequestInvalid) as caught:
        fork(alice, checkpoint, **changes)
    assert caught.value.problems[0][0] == place
    assert caught.value.message.startswith(message)
    assert TrainingRun.objects.count() == 1
