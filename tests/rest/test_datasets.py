"""Datasets: uploaded in one request, listed, described, read row by row, deleted."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.db import connection
from django.test.utils import CaptureQueriesContext
from pytest_django.fixtures import Settings

from runs.models import Dataset, DatasetVersion, Recipe
from runs.tasks import check_dataset
from tests.no_room import no_room
from tests.pages import recipe_seed, seed
from tests.rest.client import Rest

ROWS = [{"prompt": f"What is {number} + 1?", "completion": str(number + 1)} for number in range(30)]
FILE = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
BYTES = "application/octet-stream"
FORM = "multipart/form-data; boundary=frontier"


def form(**parts: bytes) -> bytes:
    """Return a form; the part `file` has a file name."""
    body = b""
    for name, content in parts.items():
        extra = '; filename="rows.jsonl"' if name == "file" else ""
        body += f'--frontier\r\ncontent-disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return body + b"--frontier--\r\n"


def checked(made: dict[str, Any]) -> DatasetVersion:
    """Let the doctor look at an uploaded version."""
    version = DatasetVersion.objects.get(dataset__public_id=made["id"], number=made["version"]["number"])
    check_dataset(version.pk)
    version.refresh_from_db()
    return version


def test_a_file_becomes_a_dataset(alice: Rest) -> None:
    made = alice.post("datasets?filename=sums.jsonl&description=Small+sums", FILE, content_type=BYTES)
    assert made["version"]["ref"] == f"{made['id']}@1"
    assert (made["version"]["state"], made["version"]["size_bytes"]) == ("checking", len(FILE))
    checked(made)
    shown = alice.get(f"datasets/{made['id']}")
    assert (shown["name"], shown["description"], shown["num_versions"]) == ("sums", "Small sums", 1)
    newest = shown["newest"]
    assert (newest["state"], newest["kind"], newest["num_rows"]) == ("ready", "completion", 30)
    assert newest == alice.get(f"datasets/{made['id']}/versions/1")
    assert alice.get("datasets")["items"] == [shown]


def test_a_form_becomes_a_dataset(alice: Rest) -> None:
    body = form(name=b"Sums", description="naïve".encode(), file=FILE)
    made = alice.post("datasets", body, content_type=FORM)
    shown = alice.get(f"datasets/{made['id']}")
    assert (shown["name"], shown["description"]) == ("Sums", "naïve")
    assert checked(made).state == DatasetVersion.State.READY


def test_a_gzipped_file_is_read(alice: Rest) -> None:
    made = alice.post("datasets?filename=sums.jsonl.gz", gzip.compress(FILE), content_type="application/gzip")
    assert checked(made).num_rows == 30


def test_the_same_content_is_the_same_dataset(alice: Rest, bob: Rest) -> None:
    first, second = (alice.post("datasets", FILE, content_type=BYTES) for _ in range(2))
    assert first["id"] == second["id"]
    assert bob.post("datasets", FILE, content_type=BYTES)["id"] != first["id"]
    assert Dataset.objects.count() == 2


def test_a_dataset_gets_versions(alice: Rest) -> None:
    made = alice.post("datasets", FILE, content_type=BYTES)
    path = f"datasets/{made['id']}/versions"
    second = alice.post(path, FILE + FILE[: FILE.index(b"\n") + 1], content_type=BYTES)
    assert second["version"]["ref"] == f"{made['id']}@2"
    assert [one["number"] for one in alice.walk(f"{path}?limit=1")] == [2, 1]
    assert alice.get(f"datasets/{made['id']}")["newest"]["number"] == 2
    assert alice.refused("GET", f"{path}/3", status=404)["code"] == "not_found"


def test_nothing_is_left_in_the_folder_of_files_on_their_way(alice: Rest) -> None:
    alice.post("datasets", FILE, content_type=BYTES)
    alice.post("datasets", FILE, content_type=BYTES)
    alice.refused("POST", "datasets", form(file=b""), content_type=FORM)
    assert list(django_settings.TEMP_DIR.glob("rest-*")) == []


@pytest.mark.parametrize(
    ("body", "content_type", "status", "place"),
    [
        (b"", BYTES, 422, "body"),
        (form(file=b""), FORM, 422, "file"),
        (form(name=b"Sums"), FORM, 422, "file"),
        (form(data=FILE), FORM, 422, "data"),
        (form(file=FILE).replace(b'"file"', b'"upload"'), FORM, 422, "upload"),
        (form(file=FILE)[:-14] + form(file=FILE), FORM, 422, "file"),
        (form(file=FILE)[: len(FILE) // 2], FORM, 422, "file"),
        (form(file=FILE, nmae=b"x"), FORM, 422, "nmae"),
        (b"not a form", FORM, 422, "file"),
        (b"a=1", "application/x-www-form-urlencoded", 415, ""),
    ],
)
def test_a_request_without_a_file_is_refused(
    alice: Rest, body: bytes, content_type: str, status: int, place: str
) -> None:
    assert alice.refused("POST", "datasets", body, status=status, content_type=content_type)["place"] == place
    assert not Dataset.objects.exists()
    assert list(django_settings.TEMP_DIR.glob("rest-*")) == []


def test_a_file_that_is_too_large_is_refused(alice: Rest, settings: Settings) -> None:
    settings.MAX_UPLOAD_BYTES = 1000
    for body, content_type in ((FILE, BYTES), (form(file=FILE), FORM)):
        error = alice.refused("POST", "datasets", body, status=413, content_type=content_type)
        assert "1000 bytes" in error["message"]
    assert not Dataset.objects.exists()


@pytest.mark.parametrize("num_written", [1_000, 1 << 20])
def test_a_file_that_finds_no_room_is_told_and_leaves_nothing(alice: Rest, num_written: int) -> None:
    large = FILE * (3 * (1 << 20) // len(FILE))
    for body, content_type in ((large, BYTES), (form(file=large), FORM), (FILE * 2, BYTES)):
        with no_room(limit_bytes=min(num_written, len(body) - 1)):
            error = alice.refused("POST", "datasets", body, status=507, content_type=content_type)
        assert error["code"] == "disk_full"
    assert not Dataset.objects.exists()
    assert list(django_settings.TEMP_DIR.glob("rest-*")) == []


def test_an_encoded_body_is_refused(alice: Rest) -> None:
    error = alice.refused(
        "POST", "datasets", gzip.compress(FILE), status=415, content_type=BYTES, content_encoding="gzip"
    )
    assert "send the file as it is" in error["message"]


def test_rows_are_read_by_number(alice: Rest, version: DatasetVersion) -> None:
    path = f"datasets/{version.dataset.public_id}/versions/1/rows"
    page = alice.get(f"{path}?start=8&limit=5")
    assert (page["start"], page["num_rows"]) == (8, 10)
    assert page["items"] == [{"prompt": f"What is {n} + 1?", "completion": str(n + 1)} for n in (8, 9)]
    assert alice.get(f"{path}?start=9000")["items"] == []
    assert alice.refused("GET", f"{path}?start=-1")["place"] == "start"
    assert alice.refused("GET", f"{path}?limit=101")["place"] == "limit"


def test_a_version_that_is_not_ready_has_no_rows(alice: Rest) -> None:
    made = alice.post("datasets", FILE, content_type=BYTES)
    error = alice.refused("GET", f"datasets/{made['id']}/versions/1/rows")
    assert "is checking, not ready" in error["message"]


@pytest.mark.parametrize("path", ["datasets", "datasets/{}/versions", "runs"])
def test_a_list_does_not_read_the_reports(
    alice: Rest, recipe: Recipe, version: DatasetVersion, path: str
) -> None:
    with CaptureQueriesContext(connection) as queries:
        assert alice.get(path.format(version.dataset.public_id))["items"]
    read = "\n".join(one["sql"] for one in queries)
    assert '"runs_datasetversion"."filename"' in read
    assert '"runs_datasetversion"."report"' not in read


def test_the_report_says_what_was_found(alice: Rest, version: DatasetVersion) -> None:
    report = alice.get(f"datasets/{version.dataset.public_id}/versions/1/report")
    assert report["state"] == "ready"
    assert report["report"]["kind"] == "completion"


def test_unknown_columns_are_named(alice: Rest) -> None:
    rows = "".join(json.dumps({"frage": f"was {n}", "dies": f"das {n}"}) + "\n" for n in range(5)).encode()
    made = alice.post("datasets?filename=a.jsonl", rows, content_type=BYTES)
    path = f"datasets/{made['id']}/versions/1"
    assert checked(made).state == DatasetVersion.State.NEEDS_MAPPING
    shown = alice.done("PUT", f"{path}/mapping", {"mapping": {"prompt": "frage", "completion": "dies"}})
    assert shown["mapping"] == {"prompt": "frage", "completion": "dies"}
    assert checked(made).state == DatasetVersion.State.READY
    assert alice.get(f"{path}/rows")["items"][0] == {"prompt": "was 0", "completion": "das 0"}


def test_bad_rows_are_left_out(alice: Rest) -> None:
    made = alice.post("datasets?filename=a.jsonl", FILE + b"{broken\n", content_type=BYTES)
    path = f"datasets/{made['id']}/versions/1"
    version = checked(made)
    assert (version.state, version.num_bad_rows) == (DatasetVersion.State.NEEDS_CHOICE, 1)
    alice.post(f"{path}/skip-bad-rows", status=200)
    assert checked(made).state == DatasetVersion.State.READY
    assert alice.get(path)["num_rows"] == 30


def test_a_dataset_is_renamed_and_described(alice: Rest, version: DatasetVersion) -> None:
    path = f"datasets/{version.dataset.public_id}"
    tag = alice.send("GET", path).headers["etag"]
    shown = alice.done("PATCH", path, {"name": "Sums", "description": "small"}, if_match=tag)
    assert (shown["name"], shown["description"]) == ("Sums", "small")
    assert alice.refused("PATCH", path, {"name": "Other"}, status=412, if_match=tag)["place"] == "If-Match"
    assert alice.refused("PATCH", path, {"name": ""})["place"] == "name"
    assert alice.get(path) == shown


def test_datasets_are_sorted_and_filtered(alice: Rest) -> None:
    for number, name in enumerate("bca"):
        alice.post(f"datasets?name={name}", FILE + b"\n" * (number + 1), content_type=BYTES)
    assert [one["name"] for one in alice.walk("datasets?sort=name&limit=2")] == ["a", "b", "c"]
    assert [one["name"] for one in alice.walk("datasets?limit=1")] == ["a", "c", "b"]
    assert [one["name"] for one in alice.walk("datasets?name=B")] == ["b"]


def test_a_dataset_is_deleted_unless_a_run_uses_it(alice: Rest) -> None:
    run = seed.make_run(alice.user, name="uses it")
    used = recipe_seed.make_recipe(run).dataset_version.dataset
    error = alice.refused("DELETE", f"datasets/{used.public_id}")
    assert "uses it" in error["message"]
    made = alice.post("datasets", FILE, content_type=BYTES)
    alice.done("DELETE", f"datasets/{made['id']}", status=204)
    alice.refused("GET", f"datasets/{made['id']}", status=404)
    alice.refused("DELETE", f"datasets/{made['id']}", status=404)
