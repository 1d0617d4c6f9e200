"""The film strip of a run's fixed prompts."""

from __future__ import annotations

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from tokenizers import Tokenizer

from runs.models import FixedSample, TrainingRun, User
from runs.pages import film_strip
from runs.pages.film_strip import Strip
from runs.pages.word_changes import Change, changes
from runs.services import base_models
from tests.pages import recipe_seed, seed
from tests.pages.test_run_detail import PAYLOADS

pytestmark = pytest.mark.django_db
PROMPT = "Where does the bear sleep?"


@pytest.fixture
def trained(run: TrainingRun) -> TrainingRun:
    """Return alice's run, trained by a recipe with one prompt."""
    recipe_seed.make_recipe(run, prompts=[PROMPT])
    return run


def strip_on(page: Client, run: TrainingRun, query: str = "") -> Strip:
    reply = page.get(f"/runs/{run.public_id}/film_strip/{query}")
    assert reply.status_code == 200
    strip: Strip = reply.context["strip"]
    return strip


def texts(strip: Strip, row: int = 0) -> list[str]:
    cells = strip.rows[row].cells
    return ["".join(part.text for part in cell.parts if part.mark != "gone") for cell in cells]


def test_columns_are_the_base_model_and_then_the_steps(
    page: Client, trained: TrainingRun, tokenizer: Tokenizer
) -> None:
    for step, answer in ((20, "In a warm cave."), (None, "a a a"), (10, "In a cave.")):
        recipe_seed.add_fixed_sample(trained, tokenizer, step=step, prompt=PROMPT, answer=answer + seed.END)
    strip = strip_on(page, trained)
    assert strip.columns == [None, 10, 20]
    assert texts(strip) == ["a a a", "In a cave.", "In a warm cave."]
    assert [part.text for part in strip.rows[0].cells[2].parts if part.mark == "new"] == ["warm "]
    assert "data-film-column" in page.get(f"/runs/{trained.public_id}/").content.decode()


def test_an_answer_that_is_missing_says_why(page: Client, trained: TrainingRun, tokenizer: Tokenizer) -> None:
    add = recipe_seed.add_fixed_sample
    add(trained, tokenizer, step=10, prompt=PROMPT, answer=None)
    add(trained, tokenizer, step=20, prompt=PROMPT, answer=None, is_asked=True)
    add(trained, tokenizer, step=30, prompt=PROMPT, answer=None, error="the weights could not be saved")
    add(trained, tokenizer, step=30, prompt="no longer asked", answer="yes")
    strip = strip_on(page, trained)
    assert [cell.state for cell in strip.rows[0].cells] == ["absent", "pending", "pending", "failed"]
    assert strip.rows[0].cells[1].note == "waiting for its weights to be saved"
    assert strip.rows[0].cells[2].note == "waiting for its answer"
    assert strip.rows[0].cells[3].note == "the weights could not be saved"
    assert [row.is_current for row in strip.rows] == [True, False]


def test_an_answer_is_compared_with_the_last_one_that_there_is(
    page: Client, trained: TrainingRun, tokenizer: Tokenizer
) -> None:
    add = recipe_seed.add_fixed_sample
    add(trained, tokenizer, step=10, prompt=PROMPT, answer="In a cave.")
    add(trained, tokenizer, step=20, prompt=PROMPT, answer=None, is_asked=True)
    add(trained, tokenizer, step=30, prompt=PROMPT, answer="In a cave.")
    cells = strip_on(page, trained).rows[0].cells
    assert [cell.is_same for cell in cells] == [False, False, False, True]


def test_a_long_strip_shows_the_newest_and_more_on_demand(
    page: Client, trained: TrainingRun, tokenizer: Tokenizer
) -> None:
    for step in range(1, 41):
        recipe_seed.add_fixed_sample(trained, tokenizer, step=step, prompt=PROMPT, answer=f"{step}")
    strip = strip_on(page, trained)
    assert strip.columns == [None, *range(17, 41)]
    assert (strip.num_older, strip.num_wanted) == (16, 48)
    # The first column shown is compared with the one before it, which is not shown.
    assert strip.rows[0].cells[1].parts == (Change("16", "gone"), Change("17", "new"))
    strip = strip_on(page, trained, "?columns=48")
    assert strip.columns == [None, *range(1, 41)]
    assert (strip.num_older, strip.num_wanted) == (0, None)
    for query in ("?columns=-1", "?columns=x", "?columns=999999"):
        assert strip_on(page, trained, query).rows


def test_it_asks_as_often_for_many_answers_as_for_one(
    page: Client, trained: TrainingRun, tokenizer: Tokenizer
) -> None:
    def num_queries(path: str) -> int:
        base_models.available()  # kept for two seconds, so read or not by chance
        with CaptureQueriesContext(connection) as queries:
            assert page.get(f"/runs/{trained.public_id}/{path}").status_code == 200
        return len(queries)

    recipe_seed.add_fixed_sample(trained, tokenizer, step=1, prompt=PROMPT, answer="1")
    recipe_seed.add_evaluations(trained, [1])
    recipe_seed.add_event(trained, "saved", 1, checkpoint="a")
    paths = ("", "panels/", "film_strip/")
    few = {path: num_queries(path) for path in paths}
    for step in range(2, 12):
        for prompt in (PROMPT, "another"):
            recipe_seed.add_fixed_sample(trained, tokenizer, step=step, prompt=prompt, answer=f"{step}")
        recipe_seed.add_event(trained, "saved", step, checkpoint=f"{step}")
        seed.add_checkpoint(trained, f"step-{step}", step=step)
    recipe_seed.add_evaluations(trained, list(range(2, 12)))
    for number in range(3):
        seed.make_run(trained.owner, parent=trained, parent_step=number, parent_path="tinker://a/weights/b")
    assert {path: num_queries(path) for path in paths} == few
    # session, user, recipe with its run, steps, samples with their operations
    assert few["film_strip/"] == 5


def test_the_version_changes_with_every_answer(trained: TrainingRun, tokenizer: Tokenizer) -> None:
    seen = [film_strip.version_of(trained)]
    sample = recipe_seed.add_fixed_sample(
        trained, tokenizer, step=1, prompt=PROMPT, answer=None, is_asked=True
    )
    seen.append(film_strip.version_of(trained))
    operation = sample.operation
    assert operation is not None
    operation.state = operation.State.DONE
    operation.save(update_fields=["state"])
    seen.append(film_strip.version_of(trained))
    recipe_seed.add_fixed_sample(trained, tokenizer, step=2, prompt=PROMPT, answer=None)
    seen.append(film_strip.version_of(trained))
    FixedSample.objects.filter(step=2).update(error="no")
    seen.append(film_strip.version_of(trained))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_prompts_and_answers_are_text(
    page: Client, run: TrainingRun, tokenizer: Tokenizer, payload: str
) -> None:
    recipe_seed.make_recipe(run, prompts=[payload])
    add = recipe_seed.add_fixed_sample
    add(run, tokenizer, step=None, prompt=payload, answer="nothing")
    add(run, tokenizer, step=1, prompt=payload, answer=payload)
    add(run, tokenizer, step=2, prompt=payload, answer=None, error=payload)
    for path in ("", "film_strip/"):
        text = page.get(f"/runs/{run.public_id}/{path}").content.decode()
        assert payload not in text
        for tag in ("<script>alert", "<img src=x", "<svg onload", "<b>x"):
            assert tag not in text


def test_it_is_the_owners_alone(page: Client, bob: User, run: TrainingRun) -> None:
    theirs = seed.make_run(bob)
    recipe_seed.make_recipe(theirs)
    assert page.get(f"/runs/{theirs.public_id}/film_strip/").status_code == 404
    assert page.get(f"/runs/{run.public_id}/film_strip/").status_code == 404  # no recipe trains it


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", []),
        ("a b", "a b", [("a b", "same")]),
        ("", "a b", [("a b", "new")]),
        ("a b", "", [("a b", "gone")]),
        (
            "the red fox",
            "the quick fox",
            [("the ", "same"), ("red", "gone"), ("quick", "new"), (" fox", "same")],
        ),
        ("one two.", "three four.", [("one two", "gone"), ("three four", "new"), (".", "same")]),
    ],
)
def test_changes_are_told_word_by_word(old: str, new: str, expected: list[tuple[str, str]]) -> None:
    assert [(change.text, change.mark) for change in changes(old, new)] == expected


def test_texts_too_long_to_compare_are_told_apart_as_a_whole() -> None:
    old, new = " ".join(f"a{n}" for n in range(900)), " ".join(f"b{n}" for n in range(900))
    assert changes(f"same {old}", f"same {new}") == (
        Change("same ", "same"),
        Change(old, "gone"),
        Change(new, "new"),
    )
