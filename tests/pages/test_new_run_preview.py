"""The card beside a new run's form: its numbers against what is known to the server."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
from django.test import Client
from pytest_django.fixtures import Settings
from tokenizers import Tokenizer

from runs.models import DatasetVersion, Recipe, User, Worker
from tests.pages import recipe_seed, seed
from tests.pages.new_run_form import NEW, filled, make_dataset, make_sizes, problems_of, ref, send

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _base_model(tokenizer: Tokenizer) -> None:
    """Have a base model in all tests."""


@pytest.fixture
def dataset(alice: User) -> DatasetVersion:
    """Return 400 rows of 20 tokens, to which a chat template adds five for each of their two messages."""
    return make_dataset(alice, num_rows=400, mean_tokens=20, longest=30)


@pytest.fixture
def gpu() -> Worker:
    """Return a worker whose device has 2 GB."""
    worker = seed.make_worker()
    worker.memory_bytes = 2_000_000_000
    worker.save(update_fields=["memory_bytes"])
    return worker


def card(page: Client, *, query: str = "", **changes: str | list[str]) -> dict[str, str]:
    """Return label -> value and note of the card's lines."""
    answer = send(page, filled(page, query=query, **changes), query=query, action="preview")
    assert answer["problems"] == []
    return lines(answer)


def lines(answer: Any) -> dict[str, str]:
    parts = re.findall(r"<dt>(.*?)</dt>\s*<dd>(.*?)</dd>", answer["html"], re.DOTALL)
    spans = {label: re.findall(r"<span[^>]*>(.*?)</span>", value) for label, value in parts}
    return {label: html.unescape(" | ".join(texts)) for label, texts in spans.items()}


def add_history(user: User, *, rates: list[float], tokens: float = 240.0) -> None:
    """Enter a run that trained here with steps of so many tokens, at these tokens a second."""
    run = seed.make_run(user, name="before")
    recipe_seed.make_recipe(run, state=Recipe.State.FINISHED)
    rows = [(n, n, {"tokens": tokens, "tokens_per_s": rate}) for n, rate in enumerate(rates, start=1)]
    seed.add_values(run, rows)


def test_it_counts_rows_steps_and_tokens(page: Client, dataset: DatasetVersion) -> None:
    shown = card(page, dataset=ref(dataset))
    # 5 % of 400 rows are held out; 3 * 380 rows in batches of 8 are 143 steps.
    assert shown["Rows"].startswith("380 to train on")
    assert "20 to validate on" in shown["Rows"]
    assert shown["Steps"].startswith("143")
    assert "sees each row 3 times" in shown["Steps"]
    assert "about 34\u202f300" in shown["Tokens"]  # 143 * 8 * 30
    assert "about 11\u202f400 an epoch" in shown["Tokens"]
    assert shown["Cut rows"].startswith("none")
    assert "the longest has 40 tokens" in shown["Cut rows"]


def test_steps_and_epochs_follow_each_other(page: Client, dataset: DatasetVersion) -> None:
    by_epochs = send(page, filled(page, dataset=ref(dataset), num_epochs="2"), action="preview")
    assert (by_epochs["num_steps"], by_epochs["num_epochs"]) == ("95", "2")
    form = filled(page, dataset=ref(dataset), length="steps", num_steps="190", num_epochs="2")
    by_steps = send(page, form, action="preview")
    assert (by_steps["num_steps"], by_steps["num_epochs"]) == ("190", "4")


def test_rules_say_what_an_empty_field_comes_to(page: Client, dataset: DatasetVersion) -> None:
    without = send(page, filled(page), action="preview")
    assert without["rules"] == {"learning_rate": "0.0012", "max_length": "2048"}
    rules = send(page, filled(page, dataset=ref(dataset)), action="preview")["rules"]
    assert rules == {
        "learning_rate": "0.0012",
        "max_length": "2048",
        "eval_every": "15",
        "save_every": "15",
        "samples.every": "15",
    }


def test_it_tells_how_many_rows_are_cut(page: Client, dataset: DatasetVersion) -> None:
    shown = card(page, dataset=ref(dataset), max_length="35")
    assert "end at 35 tokens" in shown["Cut rows"]
    share = float(shown["Cut rows"].split(" %")[0])
    assert 15 < share < 35  # a quarter of all rows, about


def test_time_is_unknown_until_a_run_has_trained_here(
    page: Client, alice: User, dataset: DatasetVersion
) -> None:
    assert "unknown until the first run" in card(page, dataset=ref(dataset))["Time"]
    add_history(alice, rates=[100.0] * 19)
    assert "unknown until the first run" in card(page, dataset=ref(dataset))["Time"]


def test_time_is_a_range_from_this_servers_own_steps(
    page: Client, alice: User, dataset: DatasetVersion
) -> None:
    # The tenth and ninetieth percentile of 50 ... 150 are 60 and 140 tokens a second; 34,320 tokens are to do.
    add_history(alice, rates=[float(rate) for rate in range(50, 151)])
    shown = card(page, dataset=ref(dataset))["Time"]
    assert shown.startswith("5 to 10 min")
    assert "101 earlier steps" in shown


def test_steps_of_another_size_tell_nothing(page: Client, alice: User, dataset: DatasetVersion) -> None:
    add_history(alice, rates=[100.0] * 30, tokens=2000.0)
    assert "unknown until the first run" in card(page, dataset=ref(dataset))["Time"]
    assert (
        "about 6 min"
        in card(page, dataset=ref(dataset), batch_size="64", length="steps", num_steps="18")["Time"]
    )


def test_memory_fits_or_says_what_would_make_it_fit(page: Client, gpu: Worker, alice: User) -> None:
    long = make_dataset(alice, number=3, mean_tokens=600, longest=2000)
    assert card(page, dataset=ref(long))["Memory"].startswith("not known")
    make_sizes(gpu)
    small = card(page, dataset=ref(long))["Memory"]
    assert small.startswith("fits")
    assert "of 2.0 GB" in small
    make_sizes(gpu, row_bytes=1_000_000)
    wide = card(page, dataset=ref(long))["Memory"]
    assert wide.startswith("will not fit")
    assert "lower the max length to 512 and the batch size to 1" in wide
    answer = send(page, filled(page, dataset=ref(long), max_length="512", batch_size="1"), action="preview")
    assert lines(answer)["Memory"].startswith("fits")
    assert "fits" in answer["summary"]


def test_a_model_that_is_too_large_has_no_remedy(page: Client, gpu: Worker, dataset: DatasetVersion) -> None:
    make_sizes(gpu, weight_bytes=3_000_000_000)
    assert (
        "no setting of this run helps; choose a smaller base model"
        in card(page, dataset=ref(dataset))["Memory"]
    )


def test_disk_counts_the_checkpoints_that_are_kept(
    page: Client, gpu: Worker, dataset: DatasetVersion
) -> None:
    make_sizes(gpu)
    # 16 * (7168 + 12288) parameters, each with two moments, in four bytes: 3.7 MB.
    shown = card(page, dataset=ref(dataset))["Disk"]
    assert shown.startswith("14.9 MB")
    assert "4 checkpoints of 3.7 MB" in shown
    assert "free" in shown
    few = card(page, dataset=ref(dataset), keep_checkpoints="1", lora__rank="4")["Disk"]
    assert "2 checkpoints of 934 kB" in few


def test_disk_warns_before_it_is_full(page: Client, gpu: Worker, dataset: DatasetVersion) -> None:
    make_sizes(gpu, mlp_width=10**12)
    assert "keep fewer checkpoints or delete some" in card(page, dataset=ref(dataset))["Disk"]


def test_it_tells_when_the_run_would_start(
    page: Client, alice: User, dataset: DatasetVersion, settings: Settings
) -> None:
    assert "waits for a worker" in card(page, dataset=ref(dataset))["Starts"]
    seed.make_worker()
    assert card(page, dataset=ref(dataset))["Starts"].startswith("at once")
    settings.CONCURRENT_RUNS = 1
    running = seed.make_run(alice, name="running")
    seed.add_values(running, seed.curve(100), step_s=1.0)
    recipe_seed.make_recipe(running, num_steps=400)
    shown = card(page, dataset=ref(dataset))["Starts"]
    assert shown.startswith("as number 1 in the queue")
    assert "about 6 min" in shown or "about 5 min" in shown  # 300 steps of a second, a tenth more
    waiting = seed.make_run(alice, name="waiting")
    recipe_seed.make_recipe(waiting, state=Recipe.State.QUEUED)
    shown = card(page, dataset=ref(dataset))["Starts"]
    assert shown.startswith("as number 2 in the queue")
    assert "nobody can tell when yet" in shown


def test_a_fork_counts_the_steps_that_are_left(page: Client, alice: User) -> None:
    run = seed.make_run(alice, name="first", lora_rank=4)
    seed.add_values(run, seed.curve(100))
    version = recipe_seed.make_recipe(run, num_steps=400, state=Recipe.State.STOPPED).dataset_version
    make_dataset(alice, number=int(version.dataset.public_id[3:], 16) - alice.pk)
    seed.add_checkpoint(run, "step-000100", step=100)
    query = f"?fork=tinker://{run.public_id}/weights/step-000100"
    assert card(page, query=query)["Steps"].startswith("300")
    assert card(page, query=query, fork__optimizer="false")["Steps"].startswith("400")


def test_a_form_with_problems_has_no_card(page: Client, dataset: DatasetVersion) -> None:
    answer = send(page, filled(page, dataset=ref(dataset), batch_size="many"), action="preview")
    assert problems_of(answer) == {"batch_size": "must be a valid integer, got 'many'"}
    assert lines(answer) == {}
    assert answer["status"] == 200
    assert not Recipe.objects.exists()


def test_it_costs_the_same_number_of_queries_however_much_there_is(
    page: Client, alice: User, dataset: DatasetVersion, django_assert_max_num_queries: Any
) -> None:
    for number in range(20, 40):
        make_dataset(alice, number=number)
    add_history(alice, rates=[100.0] * 30)
    form = filled(page, dataset=ref(dataset))
    send(page, form, action="preview")
    with django_assert_max_num_queries(30):
        send(page, form, action="preview")
    with django_assert_max_num_queries(20):
        page.get(NEW)
