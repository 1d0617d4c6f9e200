"""The columns of a dataset that is ready can be read differently, unless a run uses it; the same file comes again."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import pytest
from django.test import Client
from tokenizers import Tokenizer

from runs.exceptions import RequestInvalid
from runs.models import Dataset, DatasetVersion, User
from tests.pages import recipe_seed, seed
from tests.pages.dataset_seed import HOSTILE, add_checked, add_version, checked
from tests.pages.test_datasets import act, page_of

pytestmark = pytest.mark.django_db
State = DatasetVersion.State
ANSWERS = "question,answer\n1+1?,2\n2+2?,4\n"
FOLD = "Read the columns differently"


@pytest.fixture(autouse=True)
def _base_model(tokenizer: Tokenizer) -> None:
    """Have a base model in all tests."""


class _Chosen(HTMLParser):
    """Collects column -> part, as a page's mapper would send them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, str] = {}
        self._column = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("name") == "column":
            self._column = given.get("value") or ""
            self.parts[self._column] = ""
        elif tag == "option" and "selected" in given and self._column in self.parts:
            self.parts[self._column] = given.get("value") or ""


def chosen(html: str) -> dict[str, str]:
    """Return which part each column is shown to hold."""
    reader = _Chosen()
    reader.feed(html.partition(FOLD)[2].partition("</details>")[0])
    return reader.parts


def choose(page: Client, version: DatasetVersion, parts: dict[str, str]) -> Any:
    return act(page, version, "columns", column=list(parts), part=list(parts.values()))


def use(user: User, version: DatasetVersion) -> None:
    """Have a run train on a version."""
    recipe = recipe_seed.make_recipe(seed.make_run(user))
    recipe.dataset_version = version
    recipe.save(update_fields=["dataset_version"])


def test_questions_with_answers_become_prompts_with_completions(page: Client, alice: User) -> None:
    version = add_checked(alice, ANSWERS, filename="faq.csv")
    assert (version.state, version.kind) == (State.READY, "prompts")
    html = page_of(page, version)
    assert chosen(html) == {"question": "prompt", "answer": "reference"}
    assert "New run with this dataset" not in html
    assert choose(page, version, {"question": "prompt", "answer": "completion"}).status_code == 200
    version.refresh_from_db()
    assert version.state == State.CHECKING
    assert FOLD not in page_of(page, version)
    version = checked(version)
    assert (version.state, version.kind, version.num_rows) == (State.READY, "completion", 2)
    html = page_of(page, version)
    assert chosen(html) == {"question": "prompt", "answer": "completion"}
    assert "New run with this dataset" in html


def test_a_choice_that_no_row_fits_can_be_taken_back(page: Client, alice: User) -> None:
    version = add_checked(alice, ANSWERS, filename="faq.csv")
    choose(page, version, {"question": "", "answer": "messages"})
    version = checked(version)
    assert version.state == State.FAILED
    assert chosen(page_of(page, version)) == {"question": "", "answer": "messages"}
    choose(page, version, {"question": "prompt", "answer": "completion"})
    assert checked(version).state == State.READY


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (
            {"Prompt": "a", "completion": "b", HOSTILE: "c"},
            {"Prompt": "prompt", "completion": "completion", HOSTILE: ""},
        ),
        ({"instruction": "a", "output": "b"}, {"instruction": "instruction", "output": "output"}),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"messages": "messages"},
        ),
    ],
)
def test_the_columns_that_were_found_are_chosen_and_choosing_them_changes_nothing(
    page: Client, alice: User, row: dict[str, Any], parts: dict[str, str]
) -> None:
    version = add_checked(alice, json.dumps(row))
    html = page_of(page, version)
    assert HOSTILE not in html
    assert chosen(html) == parts
    before = version.kind
    assert choose(page, version, parts).status_code == 200
    version = checked(version)
    assert (version.state, version.kind) == (State.READY, before)


def test_a_run_that_uses_a_version_is_why_its_columns_stay(page: Client, alice: User) -> None:
    version = add_checked(alice, "prompt,completion\na,b\n", filename="rows.csv")
    assert "A run uses this version" not in page_of(page, version)
    use(alice, version)
    html = page_of(page, version)
    assert FOLD in html
    assert "A run uses this version, so its rows stay as they are." in html
    assert chosen(html) == {}
    assert "Use these columns" not in html


def test_plain_text_has_no_columns_but_may_be_read_as_something_else(page: Client, alice: User) -> None:
    html = page_of(page, add_checked(alice, "One.\n\nTwo.\n", filename="data.txt"))
    assert FOLD not in html
    assert "read as plain text, as its name <bdi>data.txt</bdi> says" in html


# The same file again ----------------------------------------------------------------------------------------


def test_the_same_file_of_another_type_is_a_dataset_of_its_own(alice: User) -> None:
    row = '{"prompt": "a", "completion": "b"}\n'
    as_text = add_checked(alice, row, filename="data.txt")
    as_rows = add_checked(alice, row, filename="data.jsonl")
    assert (as_text.kind, as_rows.kind) == ("text", "completion")
    assert as_text.dataset != as_rows.dataset
    for name, known in (("other.json", as_rows), ("other.txt", as_text)):
        assert add_version(alice, row, filename=name) == known
    assert Dataset.objects.count() == 2


def test_a_dataset_that_holds_the_file_as_another_type_says_so(alice: User) -> None:
    row = '{"prompt": "a", "completion": "b"}\n'
    known = add_checked(alice, row, filename="data.txt")
    with pytest.raises(RequestInvalid) as refused:
        add_version(alice, row, filename="data.jsonl", dataset=known.dataset)
    for words in (
        f"{known.dataset.public_id}@1",
        "'data.txt'",
        "'data.jsonl'",
        "upload it as a dataset of its own",
    ):
        assert words in refused.value.message
    assert add_version(alice, row, filename="again.txt", dataset=known.dataset) == known
    assert DatasetVersion.objects.count() == 1


def test_columns_that_a_run_holds_fast_do_not_keep_the_file_from_being_read_differently(
    page: Client, alice: User
) -> None:
    version = add_checked(alice, ANSWERS, filename="faq.csv")
    choose(page, version, {"question": "prompt", "answer": "completion"})
    version = checked(version)
    assert add_version(alice, ANSWERS, filename="faq.csv") == version
    use(alice, version)
    other = add_version(alice, ANSWERS, filename="faq.csv")
    assert (other.dataset != version.dataset, other.mapping) == (True, {})
