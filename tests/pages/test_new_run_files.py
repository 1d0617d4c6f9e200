"""Settings of a new run as files: the form becomes YAML, and YAML, however odd, becomes the form or a clear refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from tokenizers import Tokenizer

from runs.models import DatasetVersion, Recipe, User
from tests.pages import seed
from tests.pages.new_run_form import JSON, NEW, filled, make_dataset, opened, problems_of, read, ref, send

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _base_model(tokenizer: Tokenizer) -> None:
    """Have a base model in all tests."""


@pytest.fixture
def dataset(alice: User) -> DatasetVersion:
    return make_dataset(alice)


def imported(page: Client, text: str) -> Any:
    return send(page, {"text": [text]}, action="import")


def test_a_form_comes_back_from_its_file_as_it_was(
    page: Client, alice: User, dataset: DatasetVersion
) -> None:
    form = filled(
        page,
        dataset=ref(dataset),
        name="night: run #2",
        length="steps",
        num_steps="77",
        num_epochs="",
        learning_rate="3e-5",
        lora__train_mlp="false",
        validation__datasets=[ref(make_dataset(alice, number=2))],
        samples__prompts=["yes", "two\nlines", "- 1"],
        early_stopping="4",
    )
    reply = page.post(f"{NEW}export", form)
    assert reply.headers["content-disposition"] == 'attachment; filename="run.yaml"'
    values = imported(page, reply.content.decode())["values"]
    again = {**opened(page), **values}
    first, second = send(page, form), send(page, again)
    (one, other) = Recipe.objects.filter(run__public_id__in=[first["run_id"], second["run_id"]])
    assert one.config == other.config
    assert one.run.name == other.run.name == "night: run #2"


def test_a_setting_that_a_file_leaves_out_has_its_default(page: Client, dataset: DatasetVersion) -> None:
    values = imported(page, f"base_model: mintweb/tiny\ndataset: {dataset.dataset.public_id}\nseed: 5")[
        "values"
    ]
    assert values["dataset"] == [ref(dataset)]  # the version it means today
    assert (values["seed"], values["batch_size"], values["length"]) == (["5"], ["8"], ["epochs"])
    assert values["learning_rate"] == []


def test_a_file_can_be_sent_without_javascript(page: Client, dataset: DatasetVersion) -> None:
    text = f"name: from a file\nbase_model: mintweb/tiny\ndataset: {ref(dataset)}\nnum_steps: 9\n"
    file = SimpleUploadedFile("run.yaml", b"\xef\xbb\xbf" + text.encode())
    reply = page.post(f"{NEW}import", {"file": file})
    assert reply.status_code == 200
    form = read(reply.content.decode()).fields
    assert (form["name"], form["num_steps"], form["length"]) == (["from a file"], ["9"], ["steps"])


def test_every_problem_of_a_file_is_told_with_its_line(page: Client) -> None:
    answer = imported(page, "base_model: mintweb/tiny\nlora:\n  rank: many\n  alpha: 3\nsede: 1\n")
    assert answer["status"] == 422
    assert answer["sentences"] == [
        "dataset: is missing",
        "line 3, lora.rank: must be a valid integer, got 'many'",
        "line 4, lora.alpha: extra inputs are not permitted, got 3",
        "line 5, sede: extra inputs are not permitted, got 1",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: &a [1]\nb: *a", "line 2, column 4: an alias"),
        ("a: " + "[" * 3_000, "nested more than 8 levels deep"),
        ("a" * 100_001, "the limit is 100000"),
        ("- x", "the file must hold settings"),
        ("", "the file must hold settings"),
        ("<script>alert(1)</script>", "the file must hold settings"),
    ],
)
def test_a_hostile_file_is_refused_in_both_ways(page: Client, text: str, message: str) -> None:
    answer = imported(page, text)
    assert (answer["status"], message in answer["detail"]) == (422, True)
    reply = page.post(f"{NEW}import", {"text": text})
    assert reply.status_code == 422
    assert "<script>alert" not in reply.content.decode()


def test_a_file_that_is_no_text_or_too_large_is_refused(page: Client) -> None:
    for content, message in ((b"\xff\xfe\x00", "not UTF-8"), (b"a" * 400_001, "too much for settings")):
        file = SimpleUploadedFile("run.yaml", content)
        reply = page.post(f"{NEW}import", {"file": file}, headers=JSON)
        assert reply.status_code == 422
        assert message in reply.json()["detail"]


def test_another_persons_dataset_cannot_be_imported(page: Client, bob: User) -> None:
    theirs = make_dataset(bob, number=9)
    answer = imported(page, f"base_model: mintweb/tiny\ndataset: {ref(theirs)}")
    assert (answer["status"], len(answer["sentences"])) == (422, 1)
    assert answer["sentences"][0].startswith("line 2, dataset: there is no ")


def test_the_form_is_shown_as_yaml_python_and_curl(page: Client, dataset: DatasetVersion) -> None:
    answer = send(page, filled(page, dataset=ref(dataset), name="x"), action="export")
    assert yaml.safe_load(answer["yaml"])["dataset"] == ref(dataset)
    assert "http://testserver/rest/v1/runs" in answer["python"]
    assert json.loads(answer["curl"].partition("<<'JSON'\n")[2].removesuffix("\nJSON\n"))["name"] == "x"


def test_a_form_with_problems_has_no_file(page: Client) -> None:
    assert problems_of(send(page, filled(page), action="export")) == {"dataset": "choose one"}
    reply = page.post(f"{NEW}export", filled(page, seed="x"))
    assert reply.status_code == 422
    assert read(reply.content.decode()).fields["seed"] == ["x"]


def test_a_fork_is_exported_with_the_shape_of_its_checkpoint(
    page: Client, alice: User, dataset: DatasetVersion
) -> None:
    run = seed.make_run(alice, lora_rank=4, train_unembed=False)
    seed.add_checkpoint(run, "final", step=5)
    query = f"?fork=tinker://{run.public_id}/weights/final"
    form = filled(page, query=query, dataset=ref(dataset))
    answer = send(page, form, query=query, action="export")
    assert yaml.safe_load(answer["yaml"])["lora"]["rank"] == 4


@pytest.mark.parametrize(
    ("escape", "message"),
    [("\\0", "line 5, samples.prompts[0]: must not hold NUL"), ("\\ud800", "not valid YAML: ")],
)
def test_a_letter_that_cannot_be_stored_is_refused(
    page: Client, dataset: DatasetVersion, escape: str, message: str
) -> None:
    text = f'base_model: mintweb/tiny\ndataset: {ref(dataset)}\nsamples:\n  prompts:\n    - "a{escape}b"\n'
    answer = imported(page, text)
    assert answer["status"] == 422
    assert message in answer["detail"]


def test_a_nul_in_the_form_is_refused_at_its_field(page: Client, dataset: DatasetVersion) -> None:
    form = filled(page, dataset=ref(dataset), samples__prompts=["fine", "a\0b"])
    assert set(problems_of(send(page, form))) == {"samples.prompts[1]"}
    form = filled(page, dataset="ds-\0", base_model="\0", seed="\0", train_on="\0")
    assert set(problems_of(send(page, form))) == {"dataset", "base_model", "seed", "train_on"}
