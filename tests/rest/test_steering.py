"""Steering: every action of the run's page, its status afterwards, and what a state does not allow."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runs.exceptions import RequestInvalid
from runs.models import Operation, Recipe, RunEvent, TrainingRun
from runs.schemas.recipes import Changes, SftConfig
from runs.services import recipes
from tests.pages import recipe_seed, seed
from tests.rest.client import Rest

State = Recipe.State


def address(recipe: Recipe, action: str) -> str:
    return f"runs/{recipe.run.public_id}/{action}"


def kinds(recipe: Recipe) -> list[str]:
    """Return the events of the run."""
    return list(RunEvent.objects.filter(run=recipe.run).values_list("kind", flat=True))


def test_the_status_tells_how_far_a_run_is(alice: Rest, recipe: Recipe) -> None:
    status = alice.get(address(recipe, "status"))
    assert (status["state"], status["phase"]) == ("running", "training: step 30 of 400")
    assert (status["step"], status["num_steps"], status["share"]) == (30, 400, 30 / 400)
    assert 0 < status["eta_low_s"] <= status["eta_high_s"]
    assert status["allowed"] == ["change", "pause", "save", "stop"]
    assert status["is_over"] is False


def test_a_run_of_a_client_has_no_status(alice: Rest, run: TrainingRun) -> None:
    assert alice.refused("GET", f"runs/{run.public_id}/status", status=404)["code"] == "not_found"


def test_a_run_is_paused_and_resumed(alice: Rest, recipe: Recipe) -> None:
    status = alice.post(address(recipe, "pause"), status=200)
    assert (status["state"], status["allowed"]) == ("paused", ["change", "resume", "save", "stop"])
    status = alice.post(address(recipe, "resume"), status=200)
    assert (status["state"], status["position"]) == ("queued", 1)
    assert kinds(recipe) == ["paused", "resumed"]


@pytest.mark.parametrize(
    ("action", "body", "state", "must_be"),
    [
        ("pause", None, State.PAUSED, "preparing, queued, running"),
        ("resume", None, State.RUNNING, "paused, stopped"),
        ("stop", {}, State.FINISHED, "preparing, queued, running, paused, finishing, stopping"),
        ("change", {"learning_rate": 1e-3}, State.STOPPED, "preparing, queued, running, paused"),
        ("save", {}, State.FINISHED, "running, paused"),
        ("extend", {"num_steps": 5}, State.RUNNING, "finished, stopped"),
        ("retry", None, State.RUNNING, "failed"),
    ],
)
def test_a_state_that_does_not_allow_it_is_told(
    alice: Rest, recipe: Recipe, action: str, body: Any, state: str, must_be: str
) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(state=state)
    error = alice.refused("POST", address(recipe, action), body)
    assert error["place"] == "state"
    assert error["message"] == f"cannot {action} a run that is {state}; it must be {must_be}"
    assert Recipe.objects.get(pk=recipe.pk).state == state
    assert kinds(recipe) == []


def test_a_run_is_stopped_and_keeps_its_weights(alice: Rest, recipe: Recipe) -> None:
    assert alice.post(address(recipe, "stop"), status=200)["state"] == "stopping"
    last = Operation.objects.filter(run=recipe.run).order_by("-seq").first()
    assert last is not None
    assert last.kind == Operation.Kind.SAVE_WEIGHTS


def test_a_run_is_stopped_and_its_weights_discarded(alice: Rest, recipe: Recipe) -> None:
    assert alice.post(address(recipe, "stop"), {"keep": False}, status=200)["state"] == "discarding"


def test_settings_change_from_the_next_step_on(alice: Rest, recipe: Recipe) -> None:
    alice.post(address(recipe, "change"), {"learning_rate": 1e-3, "num_steps": 500}, status=200)
    recipe.refresh_from_db()
    assert (recipe.config["learning_rate"], recipe.num_steps) == (1e-3, 500)
    assert alice.get(f"runs/{recipe.run.public_id}")["started_config"]["learning_rate"] == 2e-4


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"learning_rate": None}, {"learning_rate": 0.0016, "eval_every": 40}),
        ({"eval_every": None, "save_every": None, "num_steps": 1000}, {"eval_every": 100, "save_every": 100}),
        ({"eval_every": 7, "save_every": None}, {"eval_every": 7, "save_every": 7}),
        ({"early_stopping": None, "learning_rate": 1e-3}, {"early_stopping": None, "learning_rate": 1e-3}),
    ],
)
def test_null_puts_a_setting_back_at_its_default(
    alice: Rest, recipe: Recipe, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    alice.post(address(recipe, "change"), body, status=200)
    recipe.refresh_from_db()
    assert {name: recipe.config[name] for name in expected} == expected
    (told,) = RunEvent.objects.filter(run=recipe.run, kind="changed")
    for name, text in told.detail.items():
        assert text.endswith(f" to {recipe.config[name]}")


def test_null_is_for_the_rules_to_decide_while_the_data_is_read(alice: Rest, recipe: Recipe) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(state=State.PREPARING, preparation={})
    alice.post(address(recipe, "change"), {"learning_rate": None, "num_steps": None}, status=200)
    recipe.refresh_from_db()
    assert (recipe.config["learning_rate"], recipe.config["num_steps"]) == (None, None)


@pytest.mark.parametrize("name", ["num_steps", "learning_rate", "eval_every", "save_every"])
def test_nothing_is_left_open_that_the_loop_needs(recipe: Recipe, name: str) -> None:
    held = recipe.config
    with pytest.raises(RequestInvalid, match=f"{name}: must be a number now that the run's data is read"):
        recipes.change(recipe, Changes.model_validate({name: None}))
    recipe.refresh_from_db()
    assert recipe.config == held


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, ""),
        ({"num_steps": None}, "num_steps"),
        ({"samples": None, "learning_rate": None}, "samples"),
        ({"learning_rate": 2e-4}, ""),
        ({"num_steps": 10}, "num_steps"),
        ({"base_model": "other"}, "base_model"),
        ({"learning_rate": 2}, "learning_rate"),
    ],
)
def test_a_change_that_cannot_be_is_named(
    alice: Rest, recipe: Recipe, body: dict[str, Any], place: str
) -> None:
    assert alice.refused("POST", address(recipe, "change"), body)["place"] == place


def test_a_checkpoint_is_saved_on_demand(alice: Rest, recipe: Recipe) -> None:
    saving = alice.post(address(recipe, "save"), {"name": "before-dinner"}, status=202)
    assert saving == {
        "name": "before-dinner",
        "path": f"tinker://{recipe.run.public_id}/weights/before-dinner",
    }
    assert alice.post(address(recipe, "save"), status=202)["name"] == "manual-000030"
    assert alice.refused("POST", address(recipe, "save"), {"name": "../x"})["place"] == "name"


def test_a_checkpoint_that_is_saved_replaces_none(alice: Rest, recipe: Recipe) -> None:
    seed.add_checkpoint(recipe.run, "best", step=20)
    alice.post(address(recipe, "save"), {"name": "waiting"}, status=202)
    last = Operation.objects.filter(run=recipe.run).latest("seq")
    assert json.loads(bytes(last.payload or b""))["overwrite"] is False
    for name in ("best", "waiting"):
        error = alice.refused("POST", address(recipe, "save"), {"name": name})
        assert error["place"] == "name"
        assert error["message"] == f"{name} is the name of a checkpoint of this run; choose another"
    assert Operation.objects.filter(run=recipe.run).latest("seq") == last


@pytest.mark.parametrize("name", ["final", "step-keep", "step-000040"])
def test_a_name_that_the_run_gives_by_itself_is_not_given_by_people(
    alice: Rest, recipe: Recipe, name: str
) -> None:
    error = alice.refused("POST", address(recipe, "save"), {"name": name})
    assert error["place"] == "name"
    assert error["message"] == f"final and names that begin with step- are the run's own, got {name}"


def test_an_ended_run_is_extended(alice: Rest, recipe: Recipe) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(state=State.FINISHED)
    status = alice.post(address(recipe, "extend"), {"num_steps": 20}, status=200)
    assert (status["state"], status["num_steps"]) == ("queued", 50)
    assert alice.refused("POST", address(recipe, "extend"), {"num_steps": 0})["place"] == "num_steps"


def test_a_run_is_not_extended_beyond_the_most_steps(alice: Rest, recipe: Recipe) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(state=State.FINISHED)
    error = alice.refused("POST", address(recipe, "extend"), {"num_steps": 999_971})
    assert error["place"] == "num_steps"
    assert error["message"] == "999971 more after step 30 end at 1000001; a run has at most 1000000 steps"
    recipe.refresh_from_db()
    assert (recipe.state, recipe.num_steps) == (State.FINISHED, 400)
    assert alice.post(address(recipe, "extend"), {"num_steps": 999_970}, status=200)["num_steps"] == 1_000_000
    recipe.refresh_from_db()
    SftConfig.model_validate(recipe.config)


def test_a_failed_run_goes_on_from_its_newest_checkpoint(alice: Rest, recipe: Recipe) -> None:
    seed.add_checkpoint(recipe.run, "step-000020", step=20)
    Recipe.objects.filter(pk=recipe.pk).update(state=State.FAILED, error="out of memory")
    status = alice.post(address(recipe, "retry"), status=200)
    assert status["state"] == "queued"
    assert Recipe.objects.get(pk=recipe.pk).next_step == 20


def test_a_run_is_forked(alice: Rest, recipe: Recipe, version: Any) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(
        config={**recipe.config, "dataset": f"{version.dataset.public_id}@1"}, dataset_version=version
    )
    seed.add_checkpoint(recipe.run, "step-000010", step=10)
    seed.add_checkpoint(recipe.run, "step-000020", step=20)
    made = alice.post(address(recipe, "fork"), {"name": "fork", "changes": {"learning_rate": 5e-5}})
    assert made["parent"] == {
        "run_id": recipe.run.public_id,
        "step": 20,
        "path": f"tinker://{recipe.run.public_id}/weights/step-000020",
    }
    assert (made["name"], made["source"], made["config"]["learning_rate"]) == ("fork", "rest", 5e-5)
    older = alice.post(address(recipe, "fork"), {"checkpoint": "step-000010", "with_optimizer": False})
    assert older["parent"]["step"] == 10
    error = alice.refused("POST", address(recipe, "fork"), {"checkpoint": "weights/nothing"}, status=404)
    assert "nothing" in error["message"]
    error = alice.refused("POST", address(recipe, "fork"), {"changes": {"num_steps": 15}})
    assert (error["place"], "step 20" in error["message"]) == ("num_steps", True)


def test_a_run_without_a_checkpoint_cannot_be_forked(alice: Rest, recipe: Recipe) -> None:
    assert alice.refused("POST", address(recipe, "fork"), {})["place"] == "checkpoint"


def test_runs_wait_in_the_order_they_came(alice: Rest, recipe: Recipe) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(state=State.QUEUED)
    second = recipe_seed.make_recipe(
        seed.make_run(alice.user), state=State.QUEUED, queued_at=recipe.started_at
    )
    assert alice.get(address(second, "status"))["position"] == 2
    assert alice.get(address(recipe, "status"))["position"] == 1
