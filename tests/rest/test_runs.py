"""Runs: listed by pages in any order, read, started, renamed, deleted."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any, get_args

import pytest
from django.core.files.storage import default_storage
from django.utils import timezone
from pytest_django import DjangoCaptureOnCommitCallbacks

from runs.models import Checkpoint, DatasetVersion, Operation, Recipe, TrainingRun
from runs.rest.runs import StateName
from runs.services import holdups
from runs.services.training_runs import DisplayState
from tests.pages import recipe_seed, seed
from tests.rest.client import Rest
from tests.rest.conftest import BASE_MODEL


def settings_of(version: DatasetVersion, **changes: Any) -> dict[str, Any]:
    """Return a body that starts a run."""
    return {"base_model": BASE_MODEL, "dataset": version.dataset.public_id, "num_steps": 20} | changes


@pytest.fixture
def many(alice: Rest) -> list[TrainingRun]:
    """Return seven runs, pairs of which are alike."""
    now = timezone.now()
    return [
        seed.make_run(
            alice.user,
            name=f"run {number // 2}",
            step=number // 2,
            num_tokens=number // 2,
            created_at=now - timedelta(hours=number // 2),
            source="browser" if number % 2 else "sdk",
        )
        for number in range(7)
    ]


def test_a_run_is_listed_with_what_it_is(alice: Rest, run: TrainingRun) -> None:
    (item,) = alice.get("runs")["items"]
    assert item["id"] == run.public_id
    assert (item["name"], item["source"], item["base_model"]) == ("alice's run", "sdk", BASE_MODEL)
    assert item["lora"] == {
        "rank": 16,
        "alpha": 32.0,
        "train_attn": True,
        "train_mlp": True,
        "train_unembed": True,
    }
    assert (item["step"], item["parent"], item["error"]) == (30, None, "")
    assert item["loss"] == pytest.approx(run.loss)
    assert item["created_at"].endswith("Z")


@pytest.mark.parametrize("sort", ["created_at", "-created_at", "name", "-name", "step", "-num_tokens"])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 200])
def test_pages_show_each_run_once_in_order(
    alice: Rest, many: list[TrainingRun], sort: str, limit: int
) -> None:
    found = list(alice.walk(f"runs?sort={sort}&limit={limit}"))
    assert sorted(item["id"] for item in found) == sorted(run.public_id for run in many)
    values = [item[sort.removeprefix("-")] for item in found]
    assert values == sorted(values, reverse=sort.startswith("-"))


def test_pages_do_not_shift_when_runs_come_and_go(alice: Rest, many: list[TrainingRun]) -> None:
    first = alice.get("runs?limit=3")
    seed.make_run(alice.user, name="newer")
    TrainingRun.objects.filter(public_id=first["items"][1]["id"]).delete()
    second = alice.get(f"runs?limit=3&cursor={first['next_cursor']}")
    third = alice.get(f"runs?limit=3&cursor={second['next_cursor']}")
    seen = [item["id"] for page in (first, second, third) for item in page["items"]]
    assert sorted(seen) == sorted(run.public_id for run in many)


def test_a_cursor_opens_its_own_list_only(alice: Rest, bob: Rest, many: list[TrainingRun]) -> None:
    cursor = alice.get("runs?limit=2")["next_cursor"]
    error = alice.refused("GET", f"runs?sort=name&cursor={cursor}")
    assert error["place"] == "cursor"
    assert "another order" in error["message"]
    assert alice.refused("GET", f"checkpoints?cursor={cursor}")["place"] == "cursor"
    assert alice.refused("GET", f"runs?cursor={cursor[:-2]}xx")["place"] == "cursor"
    assert bob.get(f"runs?limit=2&cursor={cursor}")["items"] == []


def test_runs_are_filtered(alice: Rest, many: list[TrainingRun]) -> None:
    failed = seed.make_run(
        alice.user, name="Bad one", state="failed", error="out of memory", base_model="other"
    )
    (item,) = alice.get("runs?state=failed")["items"]
    assert (item["id"], item["state"], item["error"]) == (failed.public_id, "failed", "out of memory")
    assert len(alice.get("runs?source=browser")["items"]) == 3
    assert [one["id"] for one in alice.get("runs?base_model=other")["items"]] == [failed.public_id]
    assert [one["id"] for one in alice.get("runs?name=bad")["items"]] == [failed.public_id]
    assert alice.get("runs?name=bad&state=running")["items"] == []
    assert alice.get("runs?name=%25")["items"] == []  # a sign of LIKE is a sign like any other


def test_the_state_filter_agrees_with_the_states_shown(alice: Rest, many: list[TrainingRun]) -> None:
    states = list(Recipe.State)
    for state, run in zip(states, [*many, *(seed.make_run(alice.user) for _ in states)], strict=False):
        recipe_seed.make_recipe(run, state=state)
    seed.add_operations(seed.make_run(alice.user))
    shown = {item["id"]: item["state"] for item in alice.walk("runs")}
    for state in {*shown.values(), "preparing", "recovering"}:
        found = {item["id"] for item in alice.walk(f"runs?state={state}")}
        assert found == {run_id for run_id, one in shown.items() if one == state}, state


def test_a_loss_that_is_no_number_is_null(alice: Rest, run: TrainingRun) -> None:
    TrainingRun.objects.filter(pk=run.pk).update(loss=math.nan, tokens_per_s=math.inf)
    shown = alice.get(f"runs/{run.public_id}")
    assert (shown["loss"], shown["tokens_per_s"]) == (None, None)


def test_a_run_that_a_client_trains_has_no_settings(alice: Rest, run: TrainingRun) -> None:
    shown = alice.get(f"runs/{run.public_id}")
    assert [shown[name] for name in ("recipe_state", "config", "dataset", "num_steps")] == [None] * 4


def test_a_run_without_code_has_its_settings(alice: Rest, recipe: Recipe) -> None:
    shown = alice.get(f"runs/{recipe.run.public_id}")
    assert (shown["recipe_state"], shown["num_steps"]) == ("running", 400)
    assert shown["config"]["learning_rate"] == 2e-4
    assert shown["dataset"] == shown["config"]["dataset"]


def test_a_run_starts(alice: Rest, version: DatasetVersion) -> None:
    made = alice.post("runs", settings_of(version, name="nightly", lora={"rank": 4}))
    run = TrainingRun.objects.get(public_id=made["id"])
    assert (run.owner, run.source, run.name, run.lora_rank) == (alice.user, "rest", "nightly", 4)
    assert (made["state"], made["recipe_state"], made["source"]) == ("preparing", "preparing", "rest")
    assert made["dataset"] == f"{version.dataset.public_id}@1"  # a later version changes nothing
    assert made == alice.get(f"runs/{made['id']}")


@pytest.mark.parametrize(
    ("changes", "place", "message"),
    [
        ({"dataset": "ds-000000000000"}, "dataset", "no dataset"),
        ({"dataset": "ds-000000000000@2"}, "dataset", "no version 2"),
        ({"dataset": "rows.jsonl"}, "dataset", "pattern"),
        ({"base_model": "gpt-5"}, "base_model", BASE_MODEL),
        ({"learning_rate": 0}, "learning_rate", "greater than 0"),
        ({"learning_rate": "1e-4"}, "learning_rate", "number"),
        ({"lora": {"rank": 0}}, "lora.rank", "greater than or equal to 1"),
        ({"lora": {"train_attn": False, "train_mlp": False}}, "lora", "at least one of train_attn"),
        ({"num_epochs": 1}, "", "num_epochs or num_steps, not both"),
        ({"learning_rat": 1e-4}, "learning_rat", "not permitted"),
        ({"schedule": "cosin"}, "schedule", "'constant', 'linear' or 'cosine'"),
        ({"validation": {"datasets": ["ds-000000000000"]}}, "validation.datasets[0]", "no dataset"),
        ({"samples": {"prompts": [""]}}, "samples.prompts[0]", "at least 1 character"),
        ({"name": "a\nb"}, "name", "printable"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    alice: Rest, version: DatasetVersion, changes: dict[str, Any], place: str, message: str
) -> None:
    error = alice.refused("POST", "runs", settings_of(version, **changes))
    assert error["place"] == place
    assert message in error["message"]
    assert not TrainingRun.objects.exists()


def test_nobody_trains_on_somebody_elses_dataset(bob: Rest, version: DatasetVersion) -> None:
    error = bob.refused("POST", "runs", settings_of(version))
    assert error["place"] == "dataset"
    assert "no dataset" in error["message"]


def test_a_dataset_that_cannot_be_trained_on_is_told(
    alice: Rest, add_rows: Callable[..., DatasetVersion]
) -> None:
    version = add_rows([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    assert "preference" in alice.refused("POST", "runs", settings_of(version))["message"]


def test_a_run_is_renamed(alice: Rest, run: TrainingRun) -> None:
    assert alice.done("PATCH", f"runs/{run.public_id}", {"name": "Zoë's"})["name"] == "Zoë's"
    run.refresh_from_db()
    assert run.name == "Zoë's"
    assert alice.refused("PATCH", f"runs/{run.public_id}", {"name": "x" * 201})["place"] == "name"
    assert alice.refused("PATCH", f"runs/{run.public_id}", {})["place"] == "name"


def test_a_run_is_deleted_with_what_it_holds(
    alice: Rest, recipe: Recipe, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    run = recipe.run
    checkpoint = seed.add_checkpoint(run, "one")
    error = alice.refused("DELETE", f"runs/{run.public_id}")
    assert "stop" in error["message"]
    Recipe.objects.filter(pk=recipe.pk).update(state=Recipe.State.STOPPED)
    Operation.objects.filter(run=run).delete()
    with django_capture_on_commit_callbacks(execute=True):
        alice.done("DELETE", f"runs/{run.public_id}", status=204)
    assert not TrainingRun.objects.filter(pk=run.pk).exists()
    assert not Checkpoint.objects.exists()
    assert not default_storage.exists(f"{checkpoint.directory}/adapter_model.safetensors")
    alice.refused("GET", f"runs/{run.public_id}", status=404)


def test_every_state_that_people_see_has_a_name_here(alice: Rest, run: TrainingRun) -> None:
    names = {state.value.replace(" ", "_") for state in DisplayState}
    assert names == set(get_args(StateName))
    holdups.enter(run.pk, holdups.NO_ROOM_FOR_REQUEST)
    assert alice.get(f"runs/{run.public_id}")["state"] == "held_up"
    assert [one["id"] for one in alice.get("runs?state=held_up")["items"]] == [run.public_id]
