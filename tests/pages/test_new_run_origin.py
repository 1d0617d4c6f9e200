"""Where the form of a new run takes its settings from: another run, a checkpoint to go on from, a dataset."""

from __future__ import annotations

import pytest
from django.test import Client
from tokenizers import Tokenizer

from runs.models import Checkpoint, DatasetVersion, Recipe, TrainingRun, User
from tests.pages import recipe_seed, seed
from tests.pages.new_run_form import NEW, config_of, make_dataset, opened, problems_of, read, ref, send

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _base_model(tokenizer: Tokenizer) -> None:
    """Have a base model in all tests."""


@pytest.fixture
def dataset(alice: User) -> DatasetVersion:
    return make_dataset(alice)


@pytest.fixture
def parent(alice: User) -> TrainingRun:
    """Return alice's finished run of 400 steps with settings of its own."""
    run = seed.make_run(alice, name="first try", lora_rank=4, train_unembed=False)
    seed.add_values(run, seed.curve(400))
    recipe_seed.make_recipe(run, state=Recipe.State.FINISHED)
    return run


def path_of(run: TrainingRun, name: str, kind: str = "weights") -> str:
    return f"tinker://{run.public_id}/{kind}/{name}"


def test_same_as_a_run_takes_the_settings_it_was_started_with(page: Client, parent: TrainingRun) -> None:
    recipe = Recipe.objects.get(run=parent)
    recipe.config = {**recipe.config, "learning_rate": 0.5}  # changed while it trained
    recipe.save(update_fields=["config"])
    form = opened(page, f"?from={parent.public_id}")
    assert form["learning_rate"] == ["0.0002"]
    assert (form["length"], form["num_steps"]) == (["steps"], ["400"])
    assert [text for text in form["samples.prompts"] if text] == recipe_seed.PROMPTS
    config = config_of(send(page, form, query=f"?from={parent.public_id}"))
    assert config == recipe.started_config
    assert b"Same as <bdi>first try</bdi>" in page.get(f"{NEW}?from={parent.public_id}").content


def test_same_as_a_clients_run_takes_what_is_known(page: Client, run: TrainingRun) -> None:
    form = opened(page, f"?from={run.public_id}")
    assert (form["base_model"], form["lora.rank"], form["lora.train_unembed"]) == (
        [seed.MODEL],
        ["16"],
        ["false", "true"],
    )
    assert form["dataset"] == [""]


def test_a_fork_goes_on_at_its_step_with_the_shape_of_its_checkpoint(
    page: Client, parent: TrainingRun
) -> None:
    checkpoint = seed.add_checkpoint(parent, "step-000100", step=100)
    query = f"?fork={path_of(parent, checkpoint.name)}"
    form = opened(page, query)
    assert "lora.rank" not in form  # given by the checkpoint, as the base model is
    assert "base_model" not in form
    assert (form["num_steps"], form["fork.optimizer"]) == (["400"], ["false", "true"])
    form |= {"lora.rank": ["64"], "learning_rate": ["1e-5"]}
    answer = send(page, form, query=query)
    config = config_of(answer)
    assert (config["lora"]["rank"], config["learning_rate"]) == (4, 1e-5)
    run = TrainingRun.objects.get(public_id=answer["run_id"])
    assert (run.parent, run.parent_step, run.recipe.first_step) == (parent, 100, 100)


def test_a_fork_without_the_optimizer_counts_from_nothing(page: Client, parent: TrainingRun) -> None:
    seed.add_checkpoint(parent, "step-000100", step=100)
    query = f"?fork={path_of(parent, 'step-000100')}&optimizer=0"
    form = opened(page, query)
    assert form["fork.optimizer"] == ["false"]
    run = TrainingRun.objects.get(public_id=send(page, form, query=query)["run_id"])
    assert (run.parent, run.recipe.first_step) == (parent, 0)


def test_a_fork_of_a_runs_end_trains_as_long_again(page: Client, parent: TrainingRun) -> None:
    seed.add_checkpoint(parent, "final", step=400)
    query = f"?fork={path_of(parent, 'final')}"
    form = opened(page, query)
    assert (form["length"], form["num_steps"]) == (["steps"], ["800"])
    found = problems_of(send(page, {**form, "num_steps": ["400"]}, query=query))
    assert found == {
        "num_steps": "the run would end before step 400, where the fork goes on; train for longer"
    }
    assert config_of(send(page, form, query=query))["num_steps"] == 800


def test_a_fork_of_sampler_weights_has_no_optimizer_to_keep(page: Client, parent: TrainingRun) -> None:
    seed.add_checkpoint(parent, "small", kind="sampler_weights", step=100)
    query = f"?fork={path_of(parent, 'small', 'sampler_weights')}"
    html = page.get(f"{NEW}{query}").content.decode()
    assert "This checkpoint holds sampler weights only" in html
    form = {**read(html).fields, "fork.optimizer": ["true"]}
    run = TrainingRun.objects.get(public_id=send(page, form, query=query)["run_id"])
    assert run.recipe.first_step == 0


def test_what_is_not_ones_own_is_not_there(page: Client, bob: User) -> None:
    theirs = seed.make_run(bob, name="bob's secret")
    recipe_seed.make_recipe(theirs)
    seed.add_checkpoint(theirs, "final", step=1)
    for query in (f"?from={theirs.public_id}", f"?fork={path_of(theirs, 'final')}", "?from=nothing"):
        for method in (page.get, page.post):
            reply = method(f"{NEW}{query}")
            assert reply.status_code == 404, query
            assert b"secret" not in reply.content
    assert page.get(f"{NEW}?fork=nonsense").status_code == 422


def test_a_published_checkpoint_names_nothing_of_its_owners_but_its_path(page: Client, bob: User) -> None:
    theirs = seed.make_run(bob, name="bob's secret")
    checkpoint = seed.add_checkpoint(theirs, "final", step=1)
    Checkpoint.objects.filter(pk=checkpoint.pk).update(is_public=True)
    path = path_of(theirs, "final")
    html = page.get(f"{NEW}?fork={path}").content.decode()
    assert f"Fork of <bdi>{path}</bdi>" in html
    assert "secret" not in html
    assert f'href="/runs/{theirs.public_id}' not in html


def test_a_dataset_can_be_given_in_the_address(page: Client, dataset: DatasetVersion) -> None:
    assert opened(page, f"?dataset={dataset.dataset.public_id}")["dataset"] == [ref(dataset)]
    DatasetVersion.objects.update(state=DatasetVersion.State.CHECKING)
    shown = read(page.get(f"{NEW}?dataset={dataset.dataset.public_id}").content.decode())
    assert shown.fields["dataset"] == [""]
    assert "dataset" in shown.errors
