"""Payload files that no operation names go once they are old, each whatever becomes of the others."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from django.core.files.storage import default_storage

from runs.services import blobs, payload_files


def make_old(name: str) -> Path:
    path = Path(default_storage.path(name))
    os.utime(path, (0, 0))
    return path


def test_a_file_that_is_stored_again_outlives_its_deletion(db: None) -> None:
    digest = hashlib.sha256(b"again").hexdigest()
    name = blobs.put(digest, b"again")
    make_old(name)
    blobs.put(digest, b"again")  # its row is not there yet
    assert payload_files.delete_unused([name]) == 0
    assert blobs.get(name) == b"again"
    make_old(name)
    assert payload_files.delete_unused([name]) == 1
    assert not default_storage.exists(name)


def test_a_file_that_cannot_be_deleted_keeps_no_other(db: None) -> None:
    names = [blobs.put(hashlib.sha256(data).hexdigest(), data) for data in (b"one", b"two", b"three")]
    for name in names:
        make_old(name)
    in_the_way = Path(default_storage.path(names[0])).with_name(f".old-{Path(names[0]).name}")
    in_the_way.mkdir()
    assert payload_files.delete_unused(names) == 2
    assert [default_storage.exists(name) for name in names] == [True, False, False]
    in_the_way.rmdir()


def test_files_that_take_long_are_left_for_another_turn(db: None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = blobs.put(hashlib.sha256(b"late").hexdigest(), b"late")
    make_old(name)
    monkeypatch.setattr(blobs, "CLEANUP_S", 0)
    assert payload_files.delete_unused([name]) == 0
    monkeypatch.undo()
    assert payload_files.delete_unused([name]) == 1
