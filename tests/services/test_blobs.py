"""Files in storage: one bad read is no reason to give something up."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NoReturn

import pytest
from django.core.files.base import ContentFile, File
from django.core.files.storage import InMemoryStorage
from pytest_django.fixtures import Settings

from runs.services import blobs, dataset_rows


class EndpointError(Exception):
    """What a bucket's client raises; it is no OSError."""


class SilentBucket(InMemoryStorage):
    """A bucket without a network."""

    def exists(self, name: str) -> NoReturn:
        """Find nobody to ask."""
        raise EndpointError("could not connect to the endpoint")

    def _open(self, name: str, mode: str = "rb") -> NoReturn:
        raise EndpointError("could not connect to the endpoint")


def failing(times: int, error: OSError) -> Callable[[], bytes]:
    """Return a read that fails so often before it succeeds."""
    left = [error] * times

    def read() -> bytes:
        if left:
            raise left.pop()
        return b"whole"

    return read


def test_what_fails_for_a_moment_is_read_again() -> None:
    assert blobs.patiently(failing(2, OSError(errno.EIO, "input/output error"))) == b"whole"


def test_what_fails_for_good_is_told() -> None:
    with pytest.raises(OSError, match="input/output error"):
        blobs.patiently(failing(9, OSError(errno.EIO, "input/output error")))


def test_what_is_not_there_is_told_at_once() -> None:
    with pytest.raises(FileNotFoundError):
        blobs.patiently(failing(1, FileNotFoundError()))


@pytest.mark.parametrize(
    "call",
    [
        lambda: blobs.put("ab" * 32, b"content"),
        lambda: blobs.get("payloads/ab/abab"),
        lambda: dataset_rows.local_copy("datasets/1/rows.jsonl"),
    ],
)
def test_a_bucket_that_is_away_is_told_as_a_failing_disk(
    settings: Settings, call: Callable[[], object]
) -> None:
    backend = {"BACKEND": f"{__name__}.SilentBucket"}
    settings.STORAGES = {**settings.STORAGES, "default": backend}
    with pytest.raises(OSError, match="could not connect to the endpoint"):
        call()


class FickleBucket(InMemoryStorage):
    """A bucket whose network fails at the first read."""

    def _open(self, name: str, mode: str = "rb") -> File[bytes]:
        if not hasattr(self, "has_failed"):
            self.has_failed = True
            raise EndpointError("could not connect to the endpoint")
        return ContentFile(b"whole")


def test_a_bucket_that_is_away_for_a_moment_is_read_again(settings: Settings) -> None:
    backend = {"BACKEND": f"{__name__}.FickleBucket"}
    settings.STORAGES = {**settings.STORAGES, "default": backend}
    assert blobs.get("payloads/ab/abab") == b"whole"
