"""Kept states in a bucket: one that does not answer is away, not empty."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import InMemoryStorage, default_storage
from pytest_django.fixtures import Settings

from gpuworker import snapshots
from gpuworker.engine.exceptions import CheckpointError
from gpuworker.snapshots import StorageError


class EndpointError(Exception):
    """What a bucket's client raises; it is no OSError."""


class SilentBucket(InMemoryStorage):
    """A bucket without a network."""

    def listdir(self, path: str) -> NoReturn:
        """Find nobody to ask."""
        raise EndpointError("could not connect to the endpoint")


@pytest.fixture
def bucket(request: pytest.FixtureRequest, settings: Settings) -> None:
    """Keep files in a bucket of the class that the test names."""
    settings.STORAGES = {
        **settings.STORAGES,
        "default": {"BACKEND": f"{request.param.__module__}.{request.param.__name__}"},
    }


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("bucket", [SilentBucket], indirect=True)
def test_a_bucket_that_does_not_answer_may_hold_a_whole_state() -> None:
    with pytest.raises(StorageError, match="could not connect to the endpoint"):
        snapshots.fetch("snapshots/1/one")


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("bucket", [InMemoryStorage], indirect=True)
def test_a_bucket_that_answers_knows_what_it_lacks() -> None:
    with pytest.raises(CheckpointError):
        snapshots.fetch("snapshots/1/one")
    with pytest.raises(CheckpointError):
        snapshots.fingerprint("snapshots/1/one")


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("bucket", [InMemoryStorage], indirect=True)
def test_files_of_a_bucket_are_copied_for_who_needs_a_folder(tmp_path: Path) -> None:
    default_storage.save("checkpoints/1/one/adapter_config.json", ContentFile(b"{}"))
    folder = snapshots.local_folder("checkpoints/1/one", tmp_path)
    assert folder.is_relative_to(tmp_path)
    assert (folder / "adapter_config.json").read_bytes() == b"{}"
    with pytest.raises(CheckpointError):
        snapshots.local_folder("checkpoints/1/two", tmp_path)
