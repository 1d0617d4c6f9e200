"""The disk meter: what rows and measured files add up to, when it is measured, and when it warns."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from django.conf import settings
from django.core.cache import cache
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage

from runs.models import TrainingRun
from runs.services import disk
from tests.services import rows

MEASURED = Path(settings.DATA_DIR) / "run" / "disk.json"


class Volume(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def fresh() -> None:
    cache.clear()
    MEASURED.unlink(missing_ok=True)


def sizes() -> dict[str, int]:
    return {part.kind: part.size_bytes for part in disk.usage().parts}


def test_rows_are_counted_and_the_rest_is_measured_now_and_then(run: TrainingRun) -> None:
    before = sizes()
    assert before["database"] > 0
    assert before["payloads"] == 0
    cache.clear()
    rows.make_checkpoint(run)
    name = default_storage.save("payloads/ab/x", ContentFile(b"x" * 5000))
    assert sizes()["checkpoints"] == before["checkpoints"] + 100
    assert sizes()["payloads"] == 0

    disk.measure()
    measured = sizes()["payloads"]
    assert measured >= 5000
    default_storage.delete(name)
    disk.measure()
    assert sizes()["payloads"] == measured  # a walk is dear: not before some minutes are over
    os.utime(MEASURED, (0, 0))
    disk.measure()
    assert sizes()["payloads"] == measured - 5000


def test_a_torn_measurement_is_no_error(db: None) -> None:
    MEASURED.parent.mkdir(parents=True, exist_ok=True)
    MEASURED.write_text("{")
    assert sizes()["payloads"] == 0


def test_the_parts_lie_beside_each_other(run: TrainingRun) -> None:
    usage = disk.usage()
    ends = [part.offset + part.share for part in usage.parts]
    assert [part.offset for part in usage.parts] == pytest.approx([0.0, *ends[:-1]])
    assert usage.other_offset == pytest.approx(ends[-1])
    assert usage.used_bytes == sum(part.size_bytes for part in usage.parts)


@pytest.mark.parametrize(
    ("total", "free", "is_low"),
    [
        (1000 * 1024**3, 101 * 1024**3, False),
        (1000 * 1024**3, 99 * 1024**3, True),
        (10 * 1024**3, 2.1 * 1024**3, False),
        (10 * 1024**3, 1.9 * 1024**3, True),
    ],
)
def test_it_warns_when_little_is_left(
    db: None, monkeypatch: pytest.MonkeyPatch, total: int, free: float, is_low: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Volume(total, total - int(free), int(free)))
    assert disk.usage().is_low == is_low
