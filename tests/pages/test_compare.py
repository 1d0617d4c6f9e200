"""The page that compares runs: who may see it, what it says when there is nothing to compare, and its tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs

import pytest
from django.test import Client
from django.utils import timezone

from runs.models import Recipe, TrainingRun, User
from runs.pages.comparison import query_of
from runs.services import comparisons
from runs.services.comparisons import MAX_RUNS
from runs.templatetags.formats import NOTHING
from tests.pages import recipe_seed, seed

pytestmark = pytest.mark.django_db
Counter = Callable[..., AbstractContextManager[object]]


def address(*runs: TrainingRun, page: str = "/runs/compare/") -> str:
    return f"{page}?{query_of([run.public_id for run in runs])}"


def settings_of(reply: Any) -> dict[str, list[str]]:
    """Return the rows of the table that differ: what stands in each cell, with a sign where it is marked."""
    rows = [row for group in reply.context["groups"] for row in group.rows]
    return {
        row.name: [("!" if cell.differs else "") + cell.text for cell in row.cells]
        for row in rows
        if not row.is_same
    }


def results_of(reply: Any) -> dict[str, list[str]]:
    return {
        result.name: [f"{text} {note}".strip() for text, note in result.cells]
        for result in reply.context["results"]
    }


def make_runs(user: User, number: int) -> list[TrainingRun]:
    session = seed.make_run(user).session
    return [seed.make_run(user, name=f"run {index}", session=session) for index in range(number)]


def test_it_counts_its_queries_whatever_the_number_of_runs(
    page: Client, alice: User, django_assert_num_queries: Counter
) -> None:
    runs = make_runs(alice, MAX_RUNS)
    for run in runs:
        seed.add_values(run, seed.curve(3))
        recipe_seed.make_recipe(run)
        recipe_seed.add_evaluations(run, [2])
    for some in (runs[:2], runs):
        # session, user, runs, runs to choose from, validation losses, names of metrics
        with django_assert_num_queries(6):
            assert page.get(address(*some)).status_code == 200
        with django_assert_num_queries(4):
            assert page.get(address(*some, page="/runs/compare/panels/")).status_code == 200


def test_runs_stand_in_the_order_of_the_address_each_once(page: Client, alice: User) -> None:
    first, second, third = make_runs(alice, 3)
    reply = page.get(address(third, first, third, second))
    columns = reply.context["columns"]
    assert [column.title for column in columns] == ["run 2", "run 0", "run 1"]
    assert len({column.line for column in columns}) == 3
    assert columns[1].without == query_of([third.public_id, second.public_id])
    assert "<title>Compare 3 runs" in reply.content.decode()


def test_no_two_lines_of_a_full_page_look_alike(page: Client, alice: User) -> None:
    columns = page.get(address(*make_runs(alice, MAX_RUNS))).context["columns"]
    assert len({column.line for column in columns}) == MAX_RUNS


@pytest.mark.parametrize("number", [0, 1])
def test_too_few_runs_lead_to_a_choice(page: Client, alice: User, number: int) -> None:
    runs = make_runs(alice, 2)
    reply = page.get(address(*runs[:number]))
    text = reply.content.decode()
    assert reply.status_code == 200
    assert ("choose at least one more" in text) == (number == 1)
    assert text.count('name="run"') == 3
    assert text.count(" checked") == number


def test_who_has_no_runs_is_led_to_where_they_begin(page: Client) -> None:
    assert "There are no runs to compare yet" in page.get("/runs/compare/").content.decode()


def test_more_runs_than_can_be_told_apart_are_refused(page: Client, alice: User) -> None:
    runs = make_runs(alice, MAX_RUNS + 1)
    for where in ("/runs/compare/", "/runs/compare/panels/"):
        reply = page.get(address(*runs, page=where))
        assert reply.status_code == 422
        assert (
            f"at most {MAX_RUNS} runs can be compared at once, got {MAX_RUNS + 1}" in reply.content.decode()
        )


def test_what_is_not_yours_looks_as_if_it_were_missing(page: Client, alice: User, bob: User) -> None:
    mine = make_runs(alice, 2)
    theirs = seed.make_run(bob, name="bob's secret")
    nobody_s = "00000000-0000-4000-8000-000000000000:train:0"
    texts = []
    for run_id in (theirs.public_id, nobody_s):
        query = query_of([mine[0].public_id, run_id])
        reply = page.get(f"/runs/compare/?{query}")
        assert reply.status_code == 404
        text = reply.content.decode().replace(run_id, "ID")
        texts.append(re.sub(r'csrfmiddlewaretoken" value="\w+"', "", text))
        assert f"There is no training run <code>{run_id}</code>" in reply.content.decode()
        assert page.get(f"/runs/compare/panels/?{query}").status_code == 404
    assert texts[0] == texts[1]
    assert "bob" not in texts[0]


def test_a_run_that_is_gone_is_named_and_the_others_are_compared(page: Client, alice: User) -> None:
    runs = make_runs(alice, 2)
    query = query_of([*(run.public_id for run in runs), "gone"])
    reply = page.get(f"/runs/compare/?{query}")
    assert reply.status_code == 200
    assert len(reply.context["columns"]) == 2
    assert "There is no training run <code>gone</code>" in reply.content.decode()
    # Its column would be missing in the page: it is read anew.
    assert page.get(f"/runs/compare/panels/?{query}").status_code == 404


def test_settings_that_differ_are_marked(page: Client, alice: User) -> None:
    first, second, third = make_runs(alice, 3)
    for run in (first, second, third):
        recipe_seed.make_recipe(run)
    TrainingRun.objects.filter(pk=third.pk).update(lora_rank=64)
    recipe = second.recipe
    recipe.config = {
        **recipe.config,
        "learning_rate": 1e-3,
        "samples": {**recipe.config["samples"], "seed": 5},
    }
    recipe.save()
    reply = page.get(address(first, second, third))
    assert settings_of(reply) == {
        "LoRA rank": ["16", "16", "!64"],
        "learning_rate": ["0.0002", "!0.001", "0.0002"],
        "samples.seed": ["0", "!5", "0"],
    }
    text = reply.content.decode()
    assert text.count('class="differs"') == 3
    assert "was 0.0002 at the start" in text
    assert not reply.context["is_same"]
    assert page.get(address(first, first, third)).context["is_same"] is False


def test_runs_can_be_put_in_the_order_of_a_setting(page: Client, alice: User) -> None:
    own, *trained = make_runs(alice, 5)
    for run, rate in zip(trained, (1e-3, 1e-5, 1e-2, 1e-5), strict=True):
        recipe_seed.make_recipe(run)
        run.recipe.config = {**run.recipe.config, "learning_rate": rate}
        run.recipe.save()
    first, second, third, fourth = trained
    assert ordered_by("learning_rate", page.get(address(own, *trained))) == [
        second,
        fourth,
        first,
        third,
        own,
    ]
    in_order = page.get(address(second, fourth, first, third, own))
    assert ordered_by("learning_rate", in_order) == [third, first, second, fourth, own]
    assert "Order the runs by learning_rate" in in_order.content.decode()
    assert "Order the runs by LoRA rank" not in in_order.content.decode()
    TrainingRun.objects.filter(pk=own.pk).update(lora_rank=128)
    assert ordered_by("LoRA rank", page.get(address(own, *trained))) == [*trained, own]


def ordered_by(name: str, reply: Any) -> list[TrainingRun]:
    [query] = {row.ordered for group in reply.context["groups"] for row in group.rows if row.name == name}
    return [TrainingRun.objects.get(public_id=run_id) for run_id in parse_qs(query)["run"]]


def test_two_datasets_of_one_name_are_two(page: Client, alice: User) -> None:
    first, second = make_runs(alice, 2)
    for run in (first, second):
        recipe_seed.make_recipe(run)
    other = recipe_seed.make_dataset(alice, number=0x9999)
    Recipe.objects.filter(run=second).update(dataset_version=other)
    name = "pirate answers, version 1"
    assert settings_of(page.get(address(first, second)))["dataset"] == [name, f"!{name}"]


def test_what_is_not_known_of_a_run_is_no_difference(page: Client, alice: User) -> None:
    own, first, second = make_runs(alice, 3)
    for run in (first, second):
        recipe_seed.make_recipe(run)
    recipe = second.recipe
    recipe.config["batch_size"] = 32
    recipe.save()
    own.user_metadata = {"note": "by hand"}
    own.save()
    assert settings_of(page.get(address(own, first, second))) == {
        "batch_size": ["unknown", "8", "!32"],
        "note": ["by hand", "!not set", "!not set"],
    }


def test_settings_of_runs_that_are_alike_are_said_to_be(page: Client, alice: User) -> None:
    reply = page.get(address(*make_runs(alice, 2)))
    assert reply.context["is_same"]
    assert "All settings are the same." in reply.content.decode()


def test_a_long_setting_is_cut_and_differs_by_its_end(page: Client, alice: User) -> None:
    first, second = make_runs(alice, 2)
    recipe_seed.make_recipe(first, prompts=["a" * 5000 + "b"])
    recipe_seed.make_recipe(second, prompts=["a" * 5000 + "c"])
    reply = page.get(address(first, second))
    assert list(settings_of(reply)) == ["samples.prompts"]
    assert "a" * 401 not in reply.content.decode()


def test_results_stand_side_by_side(page: Client, alice: User) -> None:
    now = timezone.now()
    first, second = make_runs(alice, 2)
    TrainingRun.objects.filter(pk=first.pk).update(created_at=now - timedelta(seconds=90))
    first.refresh_from_db()
    seed.add_values(first, [(1, 1, {"loss": 2.5}), (3, 2, {"loss": 1.5})], ends_at=now)
    recipe_seed.make_recipe(second, num_steps=400, started_at=now - timedelta(seconds=61))
    rows = [(1, 1, 0.9), (2, 2, math.nan), (3, 3, 0.5), (4, 2, 0.8), (5, 3, 0.7), (6, 4, 0.75)]
    seed.add_values(
        second, [(seq, step, {"validation_loss": value}) for seq, step, value in rows], ends_at=now
    )
    assert results_of(page.get(address(first, second))) == {
        "Step": ["2", "4 of 400"],
        "Tokens": ["4\u202f096", "12\u202f288"],
        "Duration": ["1 min 30 s", "1 min 1 s"],
        "Last loss per token": ["1.500", NOTHING],
        "Last validation loss": [NOTHING, "0.7500"],
        # 0.5 was left behind when the run went back to step 2.
        "Lowest validation loss": [NOTHING, "0.7000 step 3"],
    }


def test_values_that_are_not_finite_are_said_and_never_the_lowest(alice: User) -> None:
    run = seed.make_run(alice)
    seed.add_values(run, [(1, 1, {"validation_loss": -math.inf}), (2, 2, {"validation_loss": math.nan})])
    found = comparisons.validations_of([run])[run.pk]
    assert math.isnan(found.last)
    assert found.lowest is None


def test_names_of_metrics_are_those_of_each_run(alice: User) -> None:
    first, second = make_runs(alice, 2)
    seed.add_values(first, [(1, 1, {"loss": 1.0, "reward": 0.5}), (2, 2, {"accuracy": 1.0, "loss": 1.0})])
    assert comparisons.names_of([first, second]) == {first.pk: ["accuracy", "loss", "reward"], second.pk: []}


def test_the_parts_say_what_a_page_has_to_ask_for(page: Client, alice: User) -> None:
    first, second = make_runs(alice, 2)
    TrainingRun.objects.filter(pk=second.pk).update(state="closed")
    seed.add_values(first, seed.curve(3))
    reply = page.get(address(first, second, page="/runs/compare/panels/"))
    assert json.loads(reply.context["states"]) == [{"seq": 6, "isOver": False}, {"seq": -1, "isOver": True}]
    text = reply.content.decode()
    for part in ("state-0", "state-1", "compare-results", "compare-settings"):
        assert f'data-part="{part}"' in text
    version = page.get(address(first, second)).context["settings_version"]
    query = address(first, second, page="/runs/compare/panels/")
    assert 'data-part="compare-settings"' not in page.get(f"{query}&settings={version}").content.decode()
    TrainingRun.objects.filter(pk=second.pk).update(name="renamed")
    assert 'data-part="compare-settings"' in page.get(f"{query}&settings={version}").content.decode()


def test_hostile_names_are_text(page: Client, alice: User) -> None:
    payload = "<img src=x onerror=alert(1)></script>"
    runs = [seed.make_run(alice, name=payload, user_metadata={payload: f"{payload}{n}"}) for n in range(2)]
    for where in (address(*runs), address(*runs, page="/runs/compare/panels/"), address(runs[0])):
        text = page.get(where).content.decode()
        assert "<img" not in text
        assert "&lt;img" in text
    assert "<img" not in page.get("/runs/compare/?run=%3Cimg src=x%3E").content.decode()


def test_it_forbids_inline_code_and_has_none(page: Client, alice: User) -> None:
    text = page.get(address(*make_runs(alice, 2))).content.decode()
    assert " style=" not in text
    assert "<script>" not in text


def test_a_fork_is_compared_with_its_parent_from_its_page(page: Client, alice: User, bob: User) -> None:
    parent = seed.make_run(alice, name="parent")
    fork = seed.make_fork(alice, seed.add_checkpoint(parent, "first", step=3))
    text = page.get(f"/runs/{fork.public_id}/").content.decode()
    assert address(parent, fork).replace("&", "&amp;") in text
    stranger_s = seed.make_fork(alice, seed.add_checkpoint(seed.make_run(bob), "first", step=3))
    assert "/runs/compare/" not in page.get(f"/runs/{stranger_s.public_id}/").content.decode()
