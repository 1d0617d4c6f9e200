"""A bucket in memory that fails once."""

from __future__ import annotations

from typing import Any

from django.core.files.storage import InMemoryStorage
from pytest_django.fixtures import Settings


class FlakyBucket(InMemoryStorage):
    """Fails at its first listing; like a bucket's, a folder that is not there lists as empty."""

    def __init__(self) -> None:
        super().__init__()
        self.has_failed = False

    def listdir(self, path: str) -> Any:
        """Return folders and files."""
        if not self.has_failed:
            self.has_failed = True
            raise OSError("the bucket is away")
        return super().listdir(path) if self.exists(path) else ([], [])


def use_flaky_bucket(settings: Settings) -> None:
    """Keep files in a bucket that is going to fail once."""
    backend = {"BACKEND": f"{__name__}.FlakyBucket"}
    settings.STORAGES = {**settings.STORAGES, "default": backend}
