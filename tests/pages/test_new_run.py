"""The page of a new run: its form, what is wrong with it, where its settings come from, and the start."""

from __future__ import annotations

import pytest
from django.test import Client
from tokenizers import Tokenizer

from runs.models import BaseModel, Dataset, DatasetVersion, TrainingRun, User
from runs.pages import run_form
from runs.recipes import trial
from runs.schemas.recipes import SftConfig
from tests.pages import seed
from tests.pages.new_run_form import (
    JSON,
    NEW,
    config_of,
    filled,
    make_dataset,
    problems_of,
    read,
    ref,
    send,
)
from tests.pages.test_run_detail import PAYLOADS

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _base_model(tokenizer: Tokenizer) -> None:
    """Have a base model in all tests."""


@pytest.fixture
def dataset(alice: User) -> DatasetVersion:
    return make_dataset(alice)


# -- the form --------------------------------------------------------------------------------------------


def test_the_form_as_it_is_shown_starts_a_run_with_the_defaults(
    page: Client, dataset: DatasetVersion
) -> None:
    config = config_of(send(page, filled(page, dataset=ref(dataset))))
    expected = SftConfig(base_model=seed.MODEL, dataset=ref(dataset), num_epochs=3).model_dump(mode="json")
    assert config == expected


def test_every_field_reaches_its_setting(page: Client, alice: User, dataset: DatasetVersion) -> None:
    other = make_dataset(alice, number=2)
    form = filled(
        page,
        dataset=ref(dataset),
        name="  night run \0",
        length="steps",
        num_steps="120",
        batch_size="4",
        learning_rate="2e-4",
        lora__rank="8",
        max_length="512",
        lora__train_attn=["false", "true"],
        lora__train_mlp="false",
        lora__train_unembed=["false", "true"],
        train_on="last",
        batch_tokens="2048",
        seed="7",
        schedule="linear",
        warmup_share="0.1",
        weight_decay="0.01",
        grad_clip_norm="0",
        validation__share="0.2",
        validation__max_rows="50",
        validation__datasets=[ref(other), ""],
        eval_every="10",
        early_stopping="5",
        save_every="20",
        keep_checkpoints="2",
        samples__prompts=["Who are you?", "", "Two\r\nlines"],
        samples__every="30",
        samples__max_tokens="16",
        samples__temperature="0.7",
        samples__seed="3",
    )
    answer = send(page, form)
    config = config_of(answer)
    assert config == {
        "recipe": "sft",
        "base_model": seed.MODEL,
        "dataset": ref(dataset),
        "lora": {"rank": 8, "train_attn": True, "train_mlp": False, "train_unembed": True},
        "num_epochs": None,
        "num_steps": 120,
        "batch_size": 4,
        "batch_tokens": 2048,
        "max_length": 512,
        "train_on": "last",
        "learning_rate": 2e-4,
        "schedule": "linear",
        "warmup_share": 0.1,
        "weight_decay": 0.01,
        "grad_clip_norm": 0.0,
        "seed": 7,
        "validation": {"share": 0.2, "max_rows": 50, "datasets": [ref(other)]},
        "eval_every": 10,
        "early_stopping": 5,
        "save_every": 20,
        "keep_checkpoints": 2,
        "samples": {
            "prompts": ["Who are you?", "Two\nlines"],
            "every": 30,
            "max_tokens": 16,
            "temperature": 0.7,
            "seed": 3,
        },
    }
    run = TrainingRun.objects.get(public_id=answer["run_id"])
    assert (run.name, run.source, run.lora_rank) == ("night run", "browser", 8)
    assert answer["url"] == f"/runs/{run.public_id}/"
    assert list(run.recipe.validation_versions.all()) == [other]


def test_every_setting_has_a_field() -> None:
    shown = {
        field.place for field in (*run_form.MAIN, *(one for group in run_form.MORE for one in group.fields))
    }
    by_hand = {
        "recipe",
        "base_model",
        "dataset",
        "num_epochs",
        "num_steps",
        "samples.prompts",
        "validation.datasets",
    }
    assert shown | by_hand == set(run_form.DEFAULTS) - {run_form.NAME, run_form.LENGTH}
    assert not shown & by_hand


def test_a_plain_form_leads_to_the_run(page: Client, dataset: DatasetVersion) -> None:
    reply = page.post(NEW, filled(page, dataset=ref(dataset)), follow=True)
    run = TrainingRun.objects.get()
    assert reply.redirect_chain == [(f"/runs/{run.public_id}/", 302)]
    assert b"The run was started." in reply.content


def test_a_dataset_without_a_version_means_its_newest(page: Client, dataset: DatasetVersion) -> None:
    assert config_of(send(page, filled(page, dataset=dataset.dataset.public_id)))["dataset"] == ref(dataset)


def test_only_ready_datasets_of_ones_own_that_can_be_trained_on_are_offered(
    page: Client, alice: User, bob: User, dataset: DatasetVersion
) -> None:
    make_dataset(bob, number=5)
    for number, values in enumerate(
        [{"state": "checking"}, {"state": "needs_choice"}, {"kind": "preference"}, {"kind": "prompts"}],
        start=10,
    ):
        other = make_dataset(alice, number=number)
        DatasetVersion.objects.filter(pk=other.pk).update(**values)
    newest = DatasetVersion.objects.get(pk=dataset.pk)
    newest.pk, newest.number, newest.digest = None, 2, "b" * 64
    newest.save()
    html = page.get(NEW).content.decode()
    assert html.count("version 2, 400 rows") == 2  # to train on, to validate on
    assert html.count('<option value="ds-') == 2


# -- what is wrong ---------------------------------------------------------------------------------------

WRONG = [
    ("dataset", "", "choose one"),
    ("dataset", "my data", "must match pattern"),
    ("dataset", "ds-ffffffffffff", "no dataset"),
    ("base_model", "gpt", "unknown base model 'gpt'; this server offers 'mintweb/tiny'"),
    ("num_epochs", "0", "must be greater than 0, got '0'"),
    ("num_epochs", "some", "must be a valid number, got 'some'"),
    ("batch_size", "many", "must be a valid integer, got 'many'"),
    ("batch_size", "0", "must be greater than or equal to 1, got '0'"),
    ("batch_size", "1e999", "must be a valid integer"),
    ("learning_rate", "2", "must be less than or equal to 1, got '2'"),
    ("learning_rate", "nan", "must be a finite number"),
    ("lora.rank", "65", "65 is above 64, the most mintweb/tiny takes"),
    ("lora.rank", "4000", "must be less than or equal to 1024, got '4000'"),
    ("max_length", "4096", "4096 is above 2048, the context length of mintweb/tiny"),
    ("max_length", "7", "must be greater than or equal to 8"),
    ("train_on", "nothing", "must be 'assistant', 'last' or 'all', got 'nothing'"),
    ("batch_tokens", "1", "must be greater than or equal to 16"),
    ("seed", "-1", "must be greater than or equal to 0"),
    ("schedule", "step", "must be 'constant', 'linear' or 'cosine', got 'step'"),
    ("warmup_share", "2", "must be less than or equal to"),
    ("weight_decay", "-1", "must be greater than or equal to 0"),
    ("grad_clip_norm", "inf", "must be"),
    ("validation.share", "0.9", "must be less than or equal to 0.5"),
    ("validation.max_rows", "0", "must be greater than or equal to 1"),
    ("eval_every", "0", "must be greater than or equal to 1"),
    ("early_stopping", "0", "must be greater than or equal to 1"),
    ("save_every", "x", "must be a valid integer"),
    ("keep_checkpoints", "0", "must be greater than or equal to 1"),
    ("samples.every", "0", "must be greater than or equal to 1"),
    ("samples.max_tokens", "9999", "must be less than or equal to 1024"),
    ("samples.temperature", "-1", "must be greater than or equal to 0"),
    ("samples.seed", "x", "must be a valid integer"),
]


@pytest.mark.parametrize(
    ("place", "text", "message"), WRONG, ids=[f"{place}={text}" for place, text, _ in WRONG]
)
def test_each_fields_error_is_told_at_the_field_and_keeps_what_was_typed(
    page: Client, dataset: DatasetVersion, place: str, text: str, message: str
) -> None:
    form = {**filled(page, dataset=ref(dataset), name="kept", seed="77"), place: [text]}
    answer = send(page, form)
    assert answer["status"] == 422
    assert list(problems_of(answer)) == [place]
    assert message in problems_of(answer)[place]
    reply = page.post(NEW, form)
    assert reply.status_code == 422
    shown = read(reply.content.decode())
    # A choice that is not on offer cannot stay chosen.
    is_choice = place in ("dataset", "base_model", "train_on", "schedule")
    kept = {name: texts for name, texts in form.items() if not (is_choice and name == place)}
    assert {name: shown.fields[name] for name in kept} == kept
    at = "length" if place == "num_epochs" else place
    assert message in " ".join(
        text for where, text in shown.errors.items() if where in (place, at, "num_steps")
    )
    assert not TrainingRun.objects.exists()


def test_all_problems_are_told_together(page: Client) -> None:
    form = filled(page, batch_size="x", lora__rank="4000", samples__prompts=["a", "b", "a"])
    found = problems_of(send(page, form))
    assert set(found) == {"dataset", "batch_size", "lora.rank", "samples.prompts[2]"}
    assert found["samples.prompts[2]"] == "is the same as another prompt"


def test_nothing_to_train_is_refused(page: Client, dataset: DatasetVersion) -> None:
    form = filled(page, dataset=ref(dataset), lora__train_attn="false", lora__train_mlp="false")
    (message,) = problems_of(send(page, form)).values()
    assert message == "at least one of train_attn, train_mlp, train_unembed must be true"


@pytest.mark.parametrize("kind", ["preference", "prompts"])
def test_a_dataset_that_cannot_be_trained_on_is_refused(
    page: Client, dataset: DatasetVersion, kind: str
) -> None:
    DatasetVersion.objects.update(kind=kind)
    found = problems_of(send(page, filled(page, dataset=ref(dataset))))
    assert "supervised fine-tuning takes chat, prompt and completion, or raw text" in found["dataset"]


def test_another_persons_dataset_looks_like_none(page: Client, bob: User, dataset: DatasetVersion) -> None:
    theirs = make_dataset(bob, number=9)
    for name in (ref(theirs), theirs.dataset.public_id):
        found = problems_of(send(page, filled(page, dataset=name)))["dataset"]
        nothing = name.replace(theirs.dataset.public_id, "ds-fffffffffff0")
        missing = problems_of(send(page, filled(page, dataset=nothing)))["dataset"]
        assert found.replace(theirs.dataset.public_id, "?") == missing.replace("ds-fffffffffff0", "?")
    form = filled(page, dataset=ref(dataset), validation__datasets=[ref(theirs)])
    assert set(problems_of(send(page, form))) == {"validation.datasets[0]"}
    assert page.get(f"{NEW}?dataset={theirs.dataset.public_id}").status_code == 404


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_texts_are_shown_as_text(page: Client, dataset: DatasetVersion, payload: str) -> None:
    Dataset.objects.update(name=payload)
    form = filled(
        page, dataset=payload, name=payload, seed=payload, samples__prompts=[payload], schedule=payload
    )
    reply = page.post(NEW, form)
    assert reply.status_code == 422
    assert payload not in reply.content.decode()
    assert read(reply.content.decode()).fields["samples.prompts"][0] == payload


def test_without_a_dataset_the_page_says_where_to_get_one(page: Client) -> None:
    html = page.get(NEW).content.decode()
    assert "None that can be trained on is ready yet." in html
    assert '<a href="/datasets/">Upload a dataset</a>' in html
    assert "Choose a dataset to see steps" in html


def test_a_base_model_that_could_not_be_loaded_is_no_choice(page: Client, dataset: DatasetVersion) -> None:
    BaseModel.objects.update(error="<b>out of memory</b>")
    html = page.get(NEW).content.decode()
    assert "It could not be loaded: &lt;b&gt;out of memory&lt;/b&gt;" in html
    assert "mintweb/tiny (could not be loaded)" in html
    assert problems_of(send(page, filled(page, dataset=ref(dataset)))) == {"base_model": "choose one"}
    found = problems_of(send(page, filled(page, dataset=ref(dataset), base_model=seed.MODEL)))
    assert found == {"base_model": "base model 'mintweb/tiny' could not be loaded: <b>out of memory</b>"}


# -- Try it ----------------------------------------------------------------------------------------------


def test_try_it_starts_a_run_on_the_example_from_both_pages(page: Client) -> None:
    for address in ("/runs/", NEW):
        assert b'action="/runs/try"' in page.get(address).content
    reply = page.post("/runs/try")
    run = TrainingRun.objects.get()
    assert (reply.status_code, reply.headers["location"]) == (302, f"/runs/{run.public_id}/")
    assert (run.name, run.recipe.config["samples"]["prompts"]) == (trial.NAME, list(trial.PROMPTS))
    assert run.recipe.dataset_version.num_rows == 200
    assert page.post("/runs/try", headers=JSON).status_code == 201


def test_only_its_own_methods(page: Client) -> None:
    for address in ("/runs/try", f"{NEW}preview", f"{NEW}import", f"{NEW}export"):
        assert page.get(address).status_code == 405
    assert page.delete(NEW).status_code == 405
