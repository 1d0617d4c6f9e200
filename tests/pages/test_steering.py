"""Steering on a run's page: what is offered, what the forms do, and whose they are."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from runs.models import Operation, Recipe, RunEvent, TrainingRun, User
from runs.recipes import config_files
from runs.services import histories, metrics, recipe_checks
from tests.pages import recipe_seed, seed
from tests.pages.test_run_detail import PAYLOADS

pytestmark = pytest.mark.django_db
State = Recipe.State
ACTIONS = ("pause", "resume", "stop", "save", "change", "extend", "retry")


@pytest.fixture(autouse=True)
def _base_model(tokenizer: object) -> None:
    """Every recipe needs its base model."""


@pytest.fixture
def recipe(run: TrainingRun) -> Recipe:
    """Return what trains alice's run."""
    return recipe_seed.make_recipe(run)


def post(page: Client, recipe: Recipe, action: str, **form: Any) -> Any:
    return page.post(f"/runs/{recipe.run.public_id}/{action}", form, headers={"accept": "application/json"})


def is_offered(page: Client, recipe: Recipe) -> set[str]:
    text = page.get(f"/runs/{recipe.run.public_id}/panels/").content.decode()
    return {action for action in ACTIONS if f'action="/runs/{recipe.run.public_id}/{action}"' in text}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (State.PREPARING, {"pause", "stop", "change"}),
        (State.QUEUED, {"pause", "stop", "change"}),
        (State.RUNNING, {"pause", "stop", "change", "save"}),
        (State.PAUSED, {"resume", "stop", "change", "save"}),
        (State.FINISHING, {"stop"}),
        (State.STOPPING, {"stop"}),
        (State.FINISHED, {"extend"}),
        (State.STOPPED, {"extend", "resume"}),
        (State.DISCARDED, set()),
    ],
)
def test_only_what_the_state_allows_is_offered(
    page: Client, recipe: Recipe, state: str, expected: set[str]
) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(state=state)
    assert is_offered(page, recipe) == expected


def test_a_run_of_a_client_is_not_steered(page: Client, run: TrainingRun) -> None:
    text = page.get(f"/runs/{run.public_id}/").content.decode()
    assert 'data-part="steering"' not in text
    for action in ACTIONS:
        assert page.post(f"/runs/{run.public_id}/{action}").status_code == 404


def test_a_retry_says_from_where(page: Client, recipe: Recipe) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(state=State.FAILED, error="out of memory")
    assert is_offered(page, recipe) == set()
    seed.add_checkpoint(recipe.run, "step-000020", step=20)
    text = page.get(f"/runs/{recipe.run.public_id}/").content.decode()
    assert "Retry from step 20" in text
    assert "checkpoint step-000020" in text
    assert "out of memory" in text
    assert post(page, recipe, "retry").status_code == 200
    recipe.refresh_from_db()
    assert (recipe.state, recipe.next_step) == (State.QUEUED, 20)
    assert Operation.objects.filter(run=recipe.run, kind=Operation.Kind.LOAD_WEIGHTS).exists()


def test_pause_resume_save_and_stop(page: Client, recipe: Recipe) -> None:
    for action, form, state in (
        ("save", {}, State.RUNNING),
        ("pause", {}, State.PAUSED),
        ("resume", {}, State.QUEUED),
        ("stop", {"keep": "yes"}, State.STOPPING),
    ):
        reply = post(page, recipe, action, **form)
        assert reply.status_code == 200, action
        assert reply.json()["detail"].endswith(".")
        recipe.refresh_from_db()
        assert recipe.state == state
    kinds = list(RunEvent.objects.filter(run=recipe.run).values_list("kind", flat=True))
    assert {"paused", "resumed", "stopping"} <= set(kinds)


def test_a_stop_that_discards_and_one_that_says_neither(page: Client, recipe: Recipe) -> None:
    reply = post(page, recipe, "stop")
    assert reply.status_code == 422
    assert reply.json()["problems"] == [{"place": "keep", "message": "must be yes or no, got ''"}]
    assert post(page, recipe, "stop", keep="no").status_code == 200
    recipe.refresh_from_db()
    assert recipe.state == State.DISCARDING


def test_the_dialog_says_what_a_stop_keeps(page: Client, recipe: Recipe) -> None:
    seed.add_checkpoint(recipe.run, "step-000010", step=10)
    seed.add_checkpoint(recipe.run, "step-000020", step=20)
    text = page.get(f"/runs/{recipe.run.public_id}/").content.decode()
    assert "named <strong>final</strong>, at step 30" in text
    assert "Deletes all 2 checkpoints of the run" in text


def test_only_what_was_changed_is_changed(page: Client, recipe: Recipe) -> None:
    config = dict(recipe.config)
    config["eval_every"] = 10  # somebody else changed it while this form was open
    Recipe.objects.filter(pk=recipe.pk).update(config=config)
    reply = post(page, recipe, "change", learning_rate="1e-4")
    assert reply.json() == {"detail": "Changed from the next step on: learning rate."}
    recipe.refresh_from_db()
    assert recipe.config == {**config, "learning_rate": 1e-4}
    event = RunEvent.objects.get(run=recipe.run, kind="changed")
    assert event.detail == {"learning_rate": "0.0002 to 0.0001"}
    text = page.get(f"/runs/{recipe.run.public_id}/").content.decode()
    assert "2 changed while it trained" in text
    assert '<span class="chip chip-warn">changed</span>' in text


def test_prompts_are_changed_together(page: Client, recipe: Recipe) -> None:
    form = {"has_prompts": "1", "prompt": ["One?\r\nTwo?", "  ", "Three?"]}
    assert post(page, recipe, "change", **form).status_code == 200
    recipe.refresh_from_db()
    assert recipe.config["samples"]["prompts"] == ["One?\nTwo?", "Three?"]
    assert recipe.config["samples"]["every"] == 40


def test_what_is_wrong_is_told_at_its_field(page: Client, recipe: Recipe) -> None:
    form = {"learning_rate": "fast", "num_steps": "0", "eval_every": "40", "has_prompts": "1"}
    reply = post(page, recipe, "change", **form, prompt=["x" * 9000])
    assert reply.status_code == 422
    places = {problem["place"] for problem in reply.json()["problems"]}
    assert places == {"learning_rate", "num_steps", "samples.prompts[0]"}
    reply = post(page, recipe, "change", num_steps="12")
    assert [problem["place"] for problem in reply.json()["problems"]] == ["num_steps"]
    reply = post(page, recipe, "change", learning_rate="0.0002")
    assert "nothing to change" in reply.json()["detail"]
    recipe.refresh_from_db()
    assert recipe.config["learning_rate"] == 2e-4


@pytest.mark.parametrize("text", ["", "-5", "1.5", "0", "9" * 30, "\u0665"])
def test_an_ended_run_is_not_extended_by_nonsense(page: Client, recipe: Recipe, text: str) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(state=State.FINISHED)
    reply = post(page, recipe, "extend", num_steps=text)
    assert reply.status_code == 422
    assert reply.json()["problems"][0]["place"] == "num_steps"


def test_an_ended_run_is_extended(page: Client, recipe: Recipe) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(state=State.FINISHED)
    assert post(page, recipe, "extend", num_steps="50").status_code == 200
    recipe.refresh_from_db()
    assert (recipe.state, recipe.num_steps) == (State.QUEUED, recipe.next_step + 50)


def test_forms_work_without_javascript(page: Client, recipe: Recipe) -> None:
    address = f"/runs/{recipe.run.public_id}/"
    reply = page.post(f"{address}pause", follow=True)
    assert reply.redirect_chain == [(address, 302)]
    assert "The run pauses after the steps that are on their way." in reply.content.decode()
    reply = page.post(f"{address}pause", follow=True)
    assert "This did not work" in reply.content.decode()
    # A dialog is a popover as long as no script makes it modal.
    assert '<dialog class="dialog" id="stop-dialog" popover' in reply.content.decode()


def test_what_the_state_does_not_allow_is_refused(page: Client, recipe: Recipe) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(state=State.FINISHED)
    for action, form in (
        ("pause", {}),
        ("resume", {}),
        ("stop", {"keep": "yes"}),
        ("save", {}),
        ("retry", {}),
    ):
        reply = post(page, recipe, action, **form)
        assert reply.status_code == 422, action
        assert "finished" in reply.json()["detail"]


@pytest.mark.parametrize("action", ACTIONS)
def test_somebody_elses_run_looks_as_if_it_were_missing(page: Client, bob: User, action: str) -> None:
    theirs = recipe_seed.make_recipe(seed.make_run(bob))
    assert post(page, theirs, action, keep="yes", num_steps="5").status_code == 404
    theirs.refresh_from_db()
    assert theirs.state == State.RUNNING


@pytest.mark.parametrize("action", ACTIONS)
def test_a_change_without_a_token_is_refused(alice: User, recipe: Recipe, action: str) -> None:
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(alice)
    assert strict.post(f"/runs/{recipe.run.public_id}/{action}", {"keep": "no"}).status_code == 403
    recipe.refresh_from_db()
    assert recipe.state == State.RUNNING


def test_the_settings_are_exported_as_a_file_that_is_read_back(page: Client, recipe: Recipe) -> None:
    reply = page.get(f"/runs/{recipe.run.public_id}/settings.yaml")
    assert reply["content-disposition"].startswith("attachment;")
    assert reply["content-type"].startswith("application/yaml")
    file = config_files.from_yaml(reply.content.decode())
    assert recipe_checks.parse_config(file.values).model_dump(mode="json") == recipe.config
    assert file.name == "alice's run"


# -- the head ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"state": State.PREPARING, "progress": 0.4}, "Reading the dataset: 40%"),
        ({"state": State.PAUSED}, "Paused at step 30"),
        ({"state": State.FINISHED}, "Finished"),
        ({"state": State.FAILED, "error": "no"}, "Failed at step 30"),
    ],
)
def test_the_phase_is_told_in_words(
    page: Client, recipe: Recipe, values: dict[str, Any], expected: str
) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(**values)
    assert page.get(f"/runs/{recipe.run.public_id}/").context["facts"].progress.phase == expected


def test_the_head_tells_progress_and_the_best_loss(page: Client, recipe: Recipe) -> None:
    recipe_seed.add_evaluations(recipe.run, [0, 10, 20, 30], turn=0.5)
    Recipe.objects.filter(pk=recipe.pk).update(best_step=20, num_steps=120)
    progress = page.get(f"/runs/{recipe.run.public_id}/").context["facts"].progress
    assert (progress.step, progress.num_steps, progress.percent) == (30, 120, 25)
    assert progress.best_loss is not None
    assert progress.validation_loss is not None
    assert progress.time_left.endswith(" left")
    assert progress.dataset_name == "pirate answers"


# -- events and lineage -----------------------------------------------------------------------------------


def marks_on(page: Client, run: TrainingRun) -> dict[str, Any]:
    marks: dict[str, Any] = json.loads(page.get(f"/runs/{run.public_id}/panels/").context["marks"])
    return marks


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_events_are_text_and_data(page: Client, recipe: Recipe, payload: str) -> None:
    recipe_seed.add_event(recipe.run, "failed", 3, error=payload)
    Recipe.objects.filter(pk=recipe.pk).update(
        error=payload, config={**recipe.config, "train_on": payload, payload: payload}
    )
    for path in ("", "panels/"):
        text = page.get(f"/runs/{recipe.run.public_id}/{path}").content.decode()
        assert payload not in text
        for tag in ("<script>alert", "<img src=x", "<svg onload", "<b>x"):
            assert tag not in text
    assert marks_on(page, recipe.run)["events"][0]["detail"] == f"error {payload}"


def test_the_chart_gets_the_events_in_order_and_the_best_step(page: Client, recipe: Recipe) -> None:
    Recipe.objects.filter(pk=recipe.pk).update(best_step=20)
    for step in range(1, 31):
        recipe_seed.add_event(recipe.run, "saved", step, checkpoint=f"step-{step}")
    marks = marks_on(page, recipe.run)
    assert [event["step"] for event in marks["events"]] == list(range(1, 31))
    assert marks["bestStep"] == 20
    text = page.get(f"/runs/{recipe.run.public_id}/").content.decode()
    assert "10 older" in text


def fork_of(
    parent: TrainingRun, step: int, *, name: str = "", with_optimizer: bool = True, owner: User | None = None
) -> TrainingRun:
    checkpoint = seed.add_checkpoint(parent, f"step-{step:06d}-{TrainingRun.objects.count()}", step=step)
    run = seed.make_fork(owner or parent.owner, checkpoint, name=name, with_optimizer=with_optimizer)
    first = step if with_optimizer else 0
    recipe_seed.make_recipe(run, first_step=first, next_step=first)
    return run


def ancestors_of(page: Client, run: TrainingRun) -> list[dict[str, Any]]:
    ancestors: list[dict[str, Any]] = page.get(f"/runs/{run.public_id}/ancestry.json").json()["ancestors"]
    return ancestors


def test_a_fork_names_its_parent_and_the_parent_its_forks(page: Client, recipe: Recipe) -> None:
    run = fork_of(recipe.run, 20, name="softer voice")
    text = page.get(f"/runs/{run.public_id}/").content.decode()
    assert f'href="/runs/{recipe.run.public_id}/"' in text
    assert "at step 20" in text
    text = page.get(f"/runs/{recipe.run.public_id}/").content.decode()
    assert "softer voice" in text


def test_the_curves_of_all_ancestors_lead_to_a_fork(page: Client, recipe: Recipe) -> None:
    child = fork_of(recipe.run, 20)
    seed.add_values(child, [(n, 20 + n, {"loss": 1.0 / n}) for n in range(1, 11)])
    grandchild = fork_of(child, 25)
    ancestors = ancestors_of(page, grandchild)
    assert [one["run"] for one in ancestors] == [child.public_id, recipe.run.public_id]
    by_name = [{series["name"]: series["step"] for series in one["series"]} for one in ancestors]
    assert by_name[0]["loss"] == list(range(21, 26))
    assert by_name[1]["loss"] == list(range(1, 21))


def test_steps_that_count_from_0_continue_no_curve(page: Client, recipe: Recipe) -> None:
    run = fork_of(recipe.run, 20, with_optimizer=False)
    assert ancestors_of(page, run) == []
    assert "weights only" in page.get(f"/runs/{run.public_id}/").content.decode()


def test_somebody_elses_parent_is_neither_named_nor_drawn(page: Client, alice: User, bob: User) -> None:
    theirs = seed.make_run(bob, name="bob's secret")
    seed.add_values(theirs, seed.curve(30))
    run = fork_of(theirs, 20, owner=alice)
    assert ancestors_of(page, run) == []
    assert b"secret" not in page.get(f"/runs/{run.public_id}/").content
    assert page.get(f"/runs/{theirs.public_id}/ancestry.json").status_code == 404


def test_a_parent_that_went_back_later_gives_its_curve_as_it_was(page: Client, alice: User) -> None:
    parent = seed.make_run(alice)
    seed.add_values(parent, [(n, n, {"loss": 1.0}) for n in range(1, 21)])
    run = fork_of(parent, 20)
    seed.add_values(parent, [(20 + n, 10 + n, {"loss": 9.0}) for n in range(1, 11)])
    series = ancestors_of(page, run)[0]["series"][0]
    assert series["mean"] == [1.0] * 20


def test_what_was_left_behind_is_kept_apart(alice: User) -> None:
    run = seed.make_run(alice)
    seed.add_values(run, [(n, n, {"loss": 1.0}) for n in range(1, 21)])
    seed.add_values(run, [(20 + n, 10 + n, {"loss": 2.0}) for n in range(1, 16)])
    seed.add_values(run, [(40 + n, 22 + n, {"loss": 3.0}) for n in range(1, 6)])
    past = histories.history(run, "loss", num_buckets=1000, weight=0.0, up_to_seq=metrics.last_seq(run))
    assert past.step == list(range(1, 28))
    assert past.mean == [1.0] * 10 + [2.0] * 12 + [3.0] * 5
    assert [(stretch.step, set(stretch.mean)) for stretch in past.abandoned] == [
        (list(range(11, 21)), {1.0}),
        (list(range(23, 26)), {2.0}),
    ]
    assert past.num_abandoned == 13


def test_the_page_does_not_read_the_datasets_report(page: Client, recipe: Recipe) -> None:
    with CaptureQueriesContext(connection) as queries:
        assert page.get(f"/runs/{recipe.run.public_id}/").status_code == 200
    read = "\n".join(one["sql"] for one in queries)
    assert '"runs_datasetversion"."number"' in read
    assert '"runs_datasetversion"."report"' not in read
