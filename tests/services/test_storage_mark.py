"""The mark of a storage: made before its first file, and where it is missing nothing counts as gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from pytest_django.fixtures import Settings

from runs.models import TrainingRun
from runs.services import blobs, storage_mark
from tests.services import rows

FOLDER = "django.core.files.storage.FileSystemStorage"
BUCKET = "django.core.files.storage.InMemoryStorage"
DIGEST = "ab" * 32


@pytest.fixture(params=[FOLDER, BUCKET])
def empty_storage(request: pytest.FixtureRequest, settings: Settings, tmp_path: Path) -> None:
    options = {"location": tmp_path / "storage"} if request.param == FOLDER else {}
    settings.STORAGES = {**settings.STORAGES, "default": {"BACKEND": request.param, "OPTIONS": options}}


@pytest.mark.usefixtures("db", "empty_storage")
def test_a_storage_of_first_use_gets_its_mark() -> None:
    assert blobs.get(blobs.put(DIGEST, b"1")) == b"1"
    with pytest.raises(FileNotFoundError):
        blobs.get("payloads/ab/none")
    assert default_storage.exists(storage_mark.NAME)


@pytest.mark.usefixtures("empty_storage")
def test_without_a_mark_nothing_is_gone(run: TrainingRun) -> None:
    blobs.delete_folder(rows.make_checkpoint(run).directory)
    with pytest.raises(OSError, match="is its disk mounted") as caught:
        blobs.get("payloads/ab/none")
    assert not isinstance(caught.value, FileNotFoundError)
    default_storage.save(storage_mark.NAME, ContentFile(b""))  # its people say so
    with pytest.raises(FileNotFoundError):
        blobs.get("payloads/ab/none")


@pytest.mark.usefixtures("empty_storage")
def test_a_storage_of_an_earlier_version_gets_its_mark(run: TrainingRun) -> None:
    rows.make_checkpoint(run)
    with pytest.raises(FileNotFoundError):
        blobs.get("payloads/ab/none")
    assert default_storage.exists(storage_mark.NAME)


@pytest.mark.parametrize("empty_storage", [FOLDER], indirect=True)
def test_without_a_mark_nothing_is_written(empty_storage: None, run: TrainingRun, tmp_path: Path) -> None:
    rows.make_checkpoint(run)
    shutil.rmtree(tmp_path / "storage")
    upload = tmp_path / "upload"
    upload.touch()
    for write in (
        lambda: blobs.put(DIGEST, b"1"),
        lambda: blobs.link_in(upload, "datasets/one"),
        lambda: blobs.move_in(upload, "datasets/one"),
    ):
        with pytest.raises(OSError, match="is its disk mounted"):
            write()
    assert not (tmp_path / "storage").exists()
