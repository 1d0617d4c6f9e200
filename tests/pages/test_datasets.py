"""The pages of datasets: every state of a version, what the doctor found and asks, rows, ownership."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.core.files.storage import default_storage
from django.test import Client
from django.utils import timezone
from pytest_django import DjangoCaptureOnCommitCallbacks
from pytest_django.fixtures import Settings

from runs.models import Dataset, DatasetVersion, Upload, User
from runs.pages import dataset_list
from runs.services import base_models, uploads
from tests.pages import recipe_seed, seed
from tests.pages.dataset_seed import HOSTILE, add_checked, add_talk, add_version, chat_line, chats, checked
from tests.pages.test_run_detail import streamed

pytestmark = pytest.mark.django_db
Counter = Callable[..., AbstractContextManager[object]]
State = DatasetVersion.State
BAD = '{"messages": [{"role": "asistant", "content": "hello"}]}\n'


def page_of(page: Client, version: DatasetVersion, **query: Any) -> str:
    reply = page.get(f"/datasets/{version.dataset.public_id}/", {"version": version.number, **query})
    assert reply.status_code == 200
    return reply.content.decode()


def act(page: Client, version: DatasetVersion, action: str, **form: Any) -> Any:
    address = f"/datasets/{version.dataset.public_id}/{version.number}/{action}"
    return page.post(address, form, headers={"accept": "application/json"})


@pytest.fixture
def talk(alice: User) -> DatasetVersion:
    """Return a dataset with one conversation of two questions."""
    return add_talk(alice)


# The list ----------------------------------------------------------------------------------------------------


def test_without_datasets_the_list_offers_the_example(page: Client, alice: User) -> None:
    text = page.get("/datasets/").content.decode()
    assert "No datasets yet" in text
    assert 'href="/datasets/" aria-current="page"' in text
    reply = page.post("/datasets/example")
    dataset = Dataset.objects.get(owner=alice)
    assert reply["location"] == f"/datasets/{dataset.public_id}/"
    assert dataset.name == "Pirate answers (example)"
    assert page.post("/datasets/example")["location"] == reply["location"]
    assert "No datasets yet" not in page.get("/datasets/").content.decode()


def test_the_list_shows_the_newest_version_and_counts_its_queries(
    page: Client, alice: User, bob: User, django_assert_num_queries: Counter
) -> None:
    version = add_checked(alice, chats(30), name=HOSTILE, description=HOSTILE)
    add_version(alice, chats(31), dataset=version.dataset)
    for number in range(3):
        add_version(alice, chats(3) + chat_line("which?", str(number)), name=f"other {number}")
    add_version(bob, chats(2), name="bob's secret")
    run = seed.make_run(alice)
    recipe_seed.make_recipe(run)
    page.get("/datasets/")
    with django_assert_num_queries(8):
        text = page.get("/datasets/").content.decode()
    assert "bob" not in text
    assert HOSTILE not in text
    row = next(row for row in text.split("<tr")[2:] if version.dataset.public_id in row)
    assert escape(HOSTILE) in row
    assert "checking" in row
    assert '<td class="number cell-versions">2</td>' in row
    used = next(row for row in text.split("<tr")[2:] if "pirate answers" in row)
    assert '<td class="number cell-runs">1</td>' in used
    assert "data-busy" in text


def test_the_list_has_pages(page: Client, alice: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_list, "PAGE_SIZE", 2)
    for number in range(3):
        add_version(alice, chat_line("which?", str(number)), name=f"set {number}")
    first, second = (page.get(f"/datasets/?page={number}").content.decode() for number in (1, 2))
    assert first.count("dataset-row") == 2
    assert "Older datasets" in first
    assert second.count("dataset-row") == 1
    assert "set 0" in second


def test_uploads_that_can_be_gone_on_with_are_listed(page: Client, alice: User, bob: User) -> None:
    target = add_version(alice, chats(2), name=HOSTILE).dataset
    plain = uploads.create(alice, size_bytes=1000, metadata={"filename": f"{HOSTILE}.jsonl"})
    aimed = uploads.create(alice, size_bytes=10, metadata={"filename": "b", "dataset": target.public_id})
    theirs = uploads.create(bob, size_bytes=10, metadata={"filename": "bobs.jsonl"})
    old = uploads.create(alice, size_bytes=10, metadata={"filename": "old.jsonl"})
    Upload.objects.filter(pk=old.pk).update(expires_at=timezone.now() - timedelta(seconds=1))
    (Path(django_settings.DATA_DIR) / "uploads" / f"{plain.public_id}.part").write_bytes(b"x" * 250)
    text = page.get("/datasets/").content.decode()
    assert {one for one in (plain, aimed, theirs, old) if one.public_id in text} == {plain, aimed}
    assert "250 B of 1.0 kB are here" in text
    assert HOSTILE not in text
    of_dataset = page.get(f"/datasets/{target.public_id}/").content.decode()
    assert aimed.public_id in of_dataset
    assert plain.public_id not in of_dataset


def test_the_page_says_what_the_server_takes(page: Client, settings: Settings) -> None:
    settings.MAX_UPLOAD_BYTES = 123_000_000
    text = page.get("/datasets/").content.decode()
    assert "up to 123 MB" in text
    assert 'data-max-bytes="123000000"' in text


# A version's states ------------------------------------------------------------------------------------------


def test_a_version_that_is_being_checked_shows_how_far(page: Client, alice: User) -> None:
    version = add_version(alice, chats(5))
    DatasetVersion.objects.filter(pk=version.pk).update(progress=0.37, num_rows=1234)
    text = page_of(page, version)
    assert 'value="0.37"' in text
    assert "37 %, 1\u202f234 rows so far" in text
    assert "data-busy" in text
    assert "New run with this dataset" not in text
    assert 'class="rendered"' not in text


def test_a_ready_version_shows_its_report_and_its_rows(page: Client, alice: User) -> None:
    version = add_checked(alice, chats(40) + chat_line("What is 1 plus 1?", "1 plus 1 is 2." * 2))
    text = page_of(page, version)
    assert version.state == State.READY
    assert "data-busy" not in text
    assert f'href="/runs/new/?dataset={version.dataset.public_id}%40{version.number}"' in text
    assert "mintweb/tiny" in text
    assert text.count('<figure class="histogram') == 2
    assert text.count("<rect") > 4
    assert "style=" not in text
    duplicates = text.split("<dt>Duplicates</dt>")[1][:120]
    assert "tone-warn" in duplicates
    assert ">1<" in duplicates
    assert version.digest in text


def test_rows_longer_than_the_model_reads_are_said(
    page: Client, alice: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = add_checked(alice, chats(3) + chat_line("Count.", "one two three " * 1500))
    assert "tokens this model reads" not in page_of(page, version)
    seed.make_base_model(tmp_path / "tokenizer")
    monkeypatch.setattr(base_models, "_cache", None)
    text = page_of(page, version)
    assert "25 % of the rows are longer than the 2\u202f048 tokens this model reads" in text
    assert "histogram-bar is-cut" in text


def test_bad_rows_are_named_by_line_and_can_be_skipped(page: Client, alice: User) -> None:
    version = add_checked(alice, chats(3) + BAD + chats(2) + '{"messages": [\n')
    text = page_of(page, version)
    assert version.state == State.NEEDS_CHOICE
    line = next(row for row in text.split("<tr>")[1:] if "asistant" in row)
    assert 'data-label="line">4<' in line
    assert "messages[0].role" in line
    assert "did you mean" in line
    broken = next(row for row in text.split("<tr>")[1:] if 'data-label="line">7<' in row)
    assert 'data-label="column">' in broken
    assert "Skip the 2 bad rows" in text
    assert "New run with this dataset" not in text
    reply = page.get(f"/datasets/{version.dataset.public_id}/1/bad_rows")
    bad = [json.loads(row) for row in streamed(reply).splitlines()]
    assert [row["line"] for row in bad] == [4, 7]
    assert act(page, version, "skip").json() == {"detail": "The bad rows are left out."}
    version = checked(version)
    assert (version.state, version.num_rows) == (State.READY, 5)
    text = page_of(page, version)
    assert "New run with this dataset" in text
    assert "left out" in text
    refused = act(page, version, "skip")
    assert refused.status_code == 422
    assert "no longer waits" in refused.json()["detail"]


def test_without_javascript_a_choice_leads_back_to_the_page(page: Client, alice: User) -> None:
    version = add_checked(alice, chats(3) + BAD)
    address = f"/datasets/{version.dataset.public_id}/"
    reply = page.post(f"{address}1/skip", follow=True)
    assert reply.redirect_chain == [(f"{address}?version=1", 302)]
    assert "The bad rows are left out." in reply.content.decode()


def test_columns_that_are_not_known_are_asked_for(page: Client, alice: User) -> None:
    content = "frage1,antwort1,x\n" + "".join(f"Frage {n} {HOSTILE},Antwort {n},1\n" for n in range(4))
    version = add_checked(alice, content, filename="rows.csv")
    assert version.state == State.NEEDS_MAPPING
    text = page_of(page, version)
    assert HOSTILE not in text
    assert "Frage 0" in text
    for column in ("frage1", "antwort1", "x"):
        assert f'name="column" value="{column}"' in text
    columns = ["frage1", "antwort1", "x"]
    twice = act(page, version, "columns", column=columns, part=["prompt", "prompt", ""])
    assert twice.status_code == 422
    assert "prompt is given to two columns, 'frage1' and 'antwort1'" in twice.json()["detail"]
    half = act(page, version, "columns", column=columns, part=["prompt", "", ""])
    assert "map one of these sets" in half.json()["detail"]
    none = act(page, version, "columns", column=columns, part=["", "", ""])
    assert "name at least one column" in none.json()["detail"]
    odd = act(page, version, "columns", column=["nothing"], part=["prompt"])
    assert "no column 'nothing'" in odd.json()["detail"]
    assert act(page, version, "columns", column=columns, part=["prompt", "completion", ""]).status_code == 200
    version = checked(version)
    assert (version.state, version.kind, version.num_rows) == (State.READY, "completion", 4)
    text = page_of(page, version)
    assert HOSTILE not in text
    assert "Unused columns" in text


def test_a_guess_of_the_columns_is_chosen_already(page: Client, alice: User) -> None:
    version = add_checked(alice, "frage,antwort\nWas?,Das.\nWo?,Hier.\n", filename="rows.csv")
    assert version.state == State.NEEDS_MAPPING
    rows = page_of(page, version).split("<tr")
    for column, part in (("frage", "prompt"), ("antwort", "completion")):
        row = next(row for row in rows if f'value="{column}"' in row)
        assert f'<option value="{part}" selected>' in row


def test_a_file_that_cannot_be_read_says_why_and_is_checked_again(page: Client, alice: User) -> None:
    version = add_checked(alice, b"%PDF-1.7 not rows")
    assert version.state == State.FAILED
    text = page_of(page, version)
    assert "This file cannot be used." in text
    assert "The file is a PDF document; save its text" in text
    assert act(page, version, "check").status_code == 200
    version.refresh_from_db()
    assert version.state == State.CHECKING


def test_a_guessed_encoding_can_be_taken(page: Client, alice: User) -> None:
    lines = [
        json.dumps({"prompt": f"caf\u00e9 {n}", "completion": "s\u00ed"}, ensure_ascii=False)
        for n in range(5)
    ]
    version = add_checked(alice, "\n".join(lines).encode("cp1252"))
    text = page_of(page, version)
    guess = version.report["encoding"]
    assert guess != "utf-8"
    assert f"Read it as {guess}" in text
    wrong = act(page, version, "encoding", encoding="utf-7")
    assert wrong.status_code == 422
    assert act(page, version, "encoding", encoding=guess).status_code == 200
    version = checked(version)
    assert version.state == State.READY
    assert "caf\u00e9 3" in page_of(page, version)


def test_hostile_texts_stay_texts_everywhere(page: Client, alice: User) -> None:
    odd = json.dumps({"messages": [{"role": HOSTILE, "content": "x"}]}) + "\n"
    broken = '{"messages": ' + HOSTILE + "\n"
    version = add_checked(
        alice, chat_line(HOSTILE, HOSTILE) + odd + broken, filename=f"{HOSTILE}.jsonl", description=HOSTILE
    )
    texts = [page_of(page, version)]
    act(page, version, "skip")
    texts.append(page_of(page, checked(version)))
    for text in texts:
        assert HOSTILE not in text
        assert escape(HOSTILE) in text
        assert "{{ 7|add:7 }}" in text
        assert "<img" not in text


# Name, versions, delete --------------------------------------------------------------------------------------


def test_a_dataset_is_renamed_and_described(page: Client, talk: DatasetVersion) -> None:
    address = f"/datasets/{talk.dataset.public_id}/edit"
    json_headers = {"accept": "application/json"}
    reply = page.post(address, {"name": " new\u202e ", "description": "two\nlines"}, headers=json_headers)
    assert reply.status_code == 200
    talk.dataset.refresh_from_db()
    assert (talk.dataset.name, talk.dataset.description) == ("new", "two\nlines")
    empty = page.post(address, {"name": "\u200b", "description": ""}, headers=json_headers)
    assert empty.status_code == 422
    assert "at least one character" in empty.json()["detail"]
    talk.dataset.refresh_from_db()
    assert talk.dataset.description == "two\nlines"


def test_versions_are_listed_and_the_old_ones_can_be_seen(page: Client, talk: DatasetVersion) -> None:
    second = checked(add_version(talk.dataset.owner, chats(7), dataset=talk.dataset))
    newest = page.get(f"/datasets/{talk.dataset.public_id}/").content.decode()
    assert "What is 0 plus 0?" in newest
    assert "not the newest" not in newest
    old = page_of(page, talk)
    assert "Alpha." in old
    assert "not the newest" in old
    for version in (talk, second):
        assert version.digest in newest
    for odd in ("0", "9", "x", "1" * 30):
        assert page.get(f"/datasets/{talk.dataset.public_id}/?version={odd}").status_code == 404


def test_the_original_can_be_downloaded(page: Client, alice: User) -> None:
    content = chats(50)
    version = add_version(alice, content, filename='../a "b".jsonl')
    reply = page.get(f"/datasets/{version.dataset.public_id}/1/original")
    assert streamed(reply) == content.encode()
    assert reply["content-length"] == str(len(content))
    assert reply["content-disposition"] == 'attachment; filename="a \\"b\\".jsonl"'
    assert reply["content-type"] == "application/octet-stream"
    assert page.get(f"/datasets/{version.dataset.public_id}/1/bad_rows").status_code == 404


def test_deleting_names_what_uses_the_dataset_first(page: Client, alice: User) -> None:
    run = seed.make_run(alice, name=HOSTILE)
    recipe = recipe_seed.make_recipe(run)
    dataset = recipe.dataset_version.dataset
    DatasetVersion.objects.filter(dataset=dataset).update(state=State.CHECKING)  # it has no files
    address = f"/datasets/{dataset.public_id}/"
    text = page.get(address).content.decode()
    dialog = text.split('id="delete-dialog"')[1]
    assert "a run uses it" in dialog
    assert escape(HOSTILE) in dialog
    assert "/delete" not in dialog
    reply = page.post(f"{address}delete", headers={"accept": "application/json"})
    assert reply.status_code == 422
    assert HOSTILE in reply.json()["detail"]
    assert Dataset.objects.filter(pk=dataset.pk).exists()


def test_a_dataset_that_nobody_uses_is_deleted_with_its_files(
    page: Client,
    talk: DatasetVersion,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    address = f"/datasets/{talk.dataset.public_id}/"
    assert "No run uses" in page.get(address).content.decode()
    assert default_storage.exists(f"{talk.directory}/rows.jsonl")
    with django_capture_on_commit_callbacks(execute=True):
        reply = page.post(f"{address}delete", headers={"accept": "application/json"})
    assert reply.json() == {"url": "/datasets/"}
    assert not Dataset.objects.exists()
    assert not default_storage.exists(f"{talk.directory}/rows.jsonl")
    assert "was deleted" in page.get("/datasets/").content.decode()
    assert page.get(address).status_code == 404


# Ownership ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "action"),
    [
        ("GET", ""),
        ("POST", "edit"),
        ("POST", "delete"),
        ("GET", "1/original"),
        ("GET", "1/bad_rows"),
        ("POST", "1/skip"),
        ("POST", "1/columns"),
        ("POST", "1/encoding"),
        ("POST", "1/check"),
    ],
)
def test_what_is_not_yours_looks_as_if_it_were_missing(
    page: Client, bob: User, method: str, action: str
) -> None:
    version = add_checked(bob, chats(3) + BAD, name="bob's secret")
    before = (version.state, version.dataset.name)
    path = f"/datasets/{version.dataset.public_id}/{action}"
    reply = page.generic(method, path)
    missing = page.generic(method, path.replace(version.dataset.public_id, "ds-000000000000"))
    assert reply.status_code == missing.status_code == 404
    assert b"bob" not in reply.content
    version.refresh_from_db()
    assert (version.state, version.dataset.name) == before
    other = "POST" if method == "GET" else "GET"
    assert page.generic(other, path).status_code == 405


def test_a_run_that_uses_a_version_keeps_its_rows(page: Client, alice: User) -> None:
    run = seed.make_run(alice)
    version = recipe_seed.make_recipe(run).dataset_version
    DatasetVersion.objects.filter(pk=version.pk).update(
        report={"columns": ["a", "b"], "sample": [], "suggested_mapping": {}}
    )
    reply = act(page, version, "columns", column=["a", "b"], part=["prompt", "completion"])
    assert reply.status_code == 422
    assert "runs use this version" in reply.json()["detail"]
