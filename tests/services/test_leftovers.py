"""What killed processes leave behind goes when it is old, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import FileSystemStorage, default_storage
from pytest_django.fixtures import Settings

from runs.models import User
from runs.services import datasets, leftovers

LONG_AGO = time.time() - 3 * 86_400


@pytest.fixture
def leave(settings: Settings, tmp_path: Path) -> Callable[..., str]:
    """Return a function that makes a folder of a dataset, in a storage of the test's own."""
    settings.STORAGES = {
        **settings.STORAGES,
        "default": {**settings.STORAGES["default"], "OPTIONS": {"location": tmp_path}},
    }

    def leave(name: str, *, changed_at: float = LONG_AGO) -> str:
        file = default_storage.save(f"datasets/{name}/rows.jsonl", ContentFile(b"{}"))
        os.utime(default_storage.path(file), (changed_at, changed_at))
        return f"datasets/{name}"

    return leave


@pytest.mark.usefixtures("db")
def test_an_old_folder_without_a_row_goes(leave: Callable[..., str]) -> None:
    lost, fresh = leave("lost"), leave("fresh", changed_at=time.time())
    leftovers.delete_dataset_folders()
    assert not default_storage.exists(lost)
    assert default_storage.exists(fresh)


def test_a_folder_that_a_row_names_stays(leave: Callable[..., str], alice: User) -> None:
    source = Path(default_storage.path("new.jsonl"))
    source.write_text('{"prompt": "Ahoy?", "completion": "Ahoy!"}\n')
    version = datasets.create_version(alice, path=source, filename="new.jsonl")
    kept = version.directory
    for path in Path(default_storage.path(kept)).iterdir():
        os.utime(path, (LONG_AGO, LONG_AGO))
    leftovers.delete_dataset_folders()
    assert default_storage.exists(kept)


@pytest.mark.usefixtures("db")
def test_a_folder_that_cannot_be_looked_at_keeps_no_other(
    leave: Callable[..., str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = [leave(name) for name in ("one", "two", "three")]
    read_time = default_storage.get_modified_time

    def fail_once(name: str) -> object:
        if name.startswith(names[1]):
            raise PermissionError(name)
        return read_time(name)

    monkeypatch.setattr(FileSystemStorage, "get_modified_time", lambda _, name: fail_once(name))
    leftovers.delete_dataset_folders()
    assert [default_storage.exists(name) for name in names] == [False, True, False]
    assert "datasets/two could not be looked at" in caplog.text


def test_old_temporary_files_and_folders_go(settings: Settings, tmp_path: Path) -> None:
    settings.TEMP_DIR = tmp_path / "tmp"
    (settings.TEMP_DIR / "folder").mkdir(parents=True)
    for name in ("file", "new"):
        (settings.TEMP_DIR / name).touch()
    for name in ("file", "folder"):
        os.utime(settings.TEMP_DIR / name, (LONG_AGO, LONG_AGO))
    leftovers.delete_temporary_files()
    assert [path.name for path in settings.TEMP_DIR.iterdir()] == ["new"]
