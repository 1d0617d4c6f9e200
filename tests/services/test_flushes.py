"""What is named in a row lies on the disk before the row does."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from django.core.files.storage import default_storage
from pytest_django.fixtures import Settings

from runs.models import Operation, TrainingRun
from runs.services import blobs, operations
from runs.services.operations import Submission
from tests.flushes import Flushes


def test_a_payload_file_is_flushed_before_its_name_appears(monkeypatch: pytest.MonkeyPatch, db: None) -> None:
    data = b"x" * 1000
    flushes = Flushes()
    flushes.watch(monkeypatch)
    name = blobs.put(hashlib.sha256(data).hexdigest(), data)
    flushes.assert_safe(Path(default_storage.path(name)))


def test_a_large_operation_is_on_the_disk_before_it_is_acknowledged(
    run: TrainingRun, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.INLINE_PAYLOAD_BYTES = 10
    flushes = Flushes()
    flushes.watch(monkeypatch)
    pk = operations.submit(
        run, Submission(kind=Operation.Kind.OPTIM_STEP, seq=1, payload=b"more than ten bytes")
    )
    flushes.assert_safe(Path(default_storage.path(Operation.objects.get(pk=pk).payload_file)))
