"""Kept states in a bucket: one that does not answer is away, not empty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from django.core.files.base import ContentFile, File
from django.core.files.storage import InMemoryStorage, default_storage
from django.test import override_settings
from pytest_django.fixtures import Settings

from gpuworker import snapshots
from gpuworker.engine.exceptions import CheckpointError
from gpuworker.snapshots import StorageError
from gpuworker.worker import GpuWorker
from tests.worker.conftest import Client, finished
from tests.worker.test_device_share import TOKENS


class EndpointError(Exception):
    """What a bucket's client raises; it is no OSError."""


class SilentBucket(InMemoryStorage):
    """A bucket without a network."""

    def listdir(self, path: str) -> NoReturn:
        """Find nobody to ask."""
        raise EndpointError("could not connect to the endpoint")


class RefusingBucket(SilentBucket):
    """A bucket that takes nothing."""

    def _save(self, name: str, content: File[bytes]) -> NoReturn:
        raise EndpointError("could not connect to the endpoint")


@pytest.fixture
def bucket(request: pytest.FixtureRequest, settings: Settings) -> None:
    """Keep files in a bucket of the class that the test names."""
    settings.STORAGES = {
        **settings.STORAGES,
        "default": {"BACKEND": f"{request.param.__module__}.{request.param.__name__}"},
    }


@pytest.mark.usefixtures("db", "bucket")
@pytest.mark.parametrize("bucket", [SilentBucket], indirect=True)
def test_a_bucket_that_does_not_answer_may_hold_a_whole_state() -> None:
    with pytest.raises(StorageError, match="could not connect to the endpoint"):
        snapshots.fetch("snapshots/1/one")


@pytest.mark.usefixtures("db", "bucket")
@pytest.mark.parametrize("bucket", [InMemoryStorage], indirect=True)
def test_a_bucket_that_answers_knows_what_it_lacks() -> None:
    with pytest.raises(CheckpointError):
        snapshots.fetch("snapshots/1/one")
    with pytest.raises(CheckpointError):
        snapshots.fingerprint("snapshots/1/one")


@pytest.mark.usefixtures("db", "bucket")
@pytest.mark.parametrize("bucket", [InMemoryStorage], indirect=True)
def test_files_of_a_bucket_are_copied_for_who_needs_a_folder(tmp_path: Path) -> None:
    default_storage.save("checkpoints/1/one/adapter_config.json", ContentFile(b"{}"))
    folder = snapshots.local_folder("checkpoints/1/one", tmp_path)
    assert folder.is_relative_to(tmp_path)
    assert (folder / "adapter_config.json").read_bytes() == b"{}"
    with pytest.raises(CheckpointError):
        snapshots.local_folder("checkpoints/1/two", tmp_path)


def test_a_bucket_that_takes_nothing_is_told_as_a_full_disk_is(
    start_worker: Callable[[], GpuWorker], new_client: Callable[..., Client], settings: Settings
) -> None:
    worker, client = start_worker(), new_client()
    finished(client.forward_backward(TOKENS))
    seat = worker._intake.seats[client.run.pk]
    state = seat.engine.export_state(seat.adapter_id, optimizer=True, gradients=True)
    backend = {"BACKEND": f"{__name__}.RefusingBucket"}
    with (
        override_settings(STORAGES={**settings.STORAGES, "default": backend}),
        pytest.raises(StorageError, match="could not connect to the endpoint"),
    ):
        snapshots.store(state, "checkpoints/1/one", seat)
