"""Run the doctor on a dataset version and enter what it found. The row is the truth: a lost task is begun again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import orjson
from django.conf import settings
from django.db.models.functions import Now

from runs.datasets import checking
from runs.datasets.checking import Outcome, Progress, Report
from runs.models import DatasetVersion
from runs.services import base_models, blobs, deletions
from runs.services.advisory_locks import LockClass, any_lock
from runs.services.dataset_rows import INDEX, ROWS, drop_copies, local_copy

ORIGINAL: Final = "original"
BAD_ROWS: Final = "bad.jsonl"
# The CPU worker has one process more than this, so that long checks do not hold up housekeeping.
NUM_SLOTS: Final = 2
_TELL_S: Final = 1.0
State = DatasetVersion.State


class _Gone(Exception):
    """The version was deleted while it was checked."""


def check(version_pk: int) -> None:
    """Check a version that waits for it, and then whatever else waits.

    Each version is checked by one process at a time and no more than two are checked at once on the whole
    server. A call that finds all places taken leaves the version to those who hold them.
    """
    tried: set[int] = set()
    while (pk := _next(version_pk, tried)) is not None:
        with any_lock(LockClass.DATASET_SLOT, range(NUM_SLOTS)) as has_slot:
            if not has_slot:
                return
            tried.add(pk)
            _check(pk)


def check_at_once(version_pk: int) -> None:
    """Check one version and nothing else, beside what takes the places: for a file that is known to be small."""
    _check(version_pk)


def unfinished() -> list[int]:
    """Return the versions that wait for a check; their tasks may have been lost."""
    return list(_waiting().values_list("pk", flat=True))


def checked_among(version_pks: Collection[int]) -> list[int]:
    """Return those of the versions whose check is done, or that are deleted."""
    going = DatasetVersion.objects.filter(pk__in=version_pks, state=State.CHECKING)
    return list(set(version_pks) - set(going.values_list("pk", flat=True)))


def _waiting() -> Any:
    return DatasetVersion.objects.filter(state=State.CHECKING).order_by("created_at")


def _next(version_pk: int, tried: set[int]) -> int | None:
    waiting = [pk for pk in unfinished() if pk not in tried]
    return version_pk if version_pk in waiting else next(iter(waiting), None)


def _check(version_pk: int) -> None:
    with any_lock(LockClass.DATASET_VERSION, [version_pk]) as is_mine:
        version = _waiting().filter(pk=version_pk).first()
        if not is_mine or version is None:
            return
        settings.TEMP_DIR.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=settings.TEMP_DIR, prefix="doctor-") as folder:
            try:
                report = _report(version, Path(folder))
                _keep_files(version, report, Path(folder))
            except _Gone:
                return
            except OSError as error:
                report = _could_not(error)
            _enter(version, report)


def _report(version: DatasetVersion, output: Path) -> Report:
    files = {info.name: info.folder / "tokenizer.json" for info in base_models.available() if info.folder}
    return checking.run(
        local_copy(f"{version.directory}/{ORIGINAL}"),
        version.filename,
        output,
        mapping=version.mapping,
        skip_bad=version.skip_bad_rows,
        encoding=version.encoding,
        tokenizers={name: path for name, path in files.items() if path.is_file()},
        memory_mb=settings.DOCTOR_MEMORY_MB,
        timeout_s=settings.DOCTOR_TIMEOUT_S,
        on_progress=_Teller(version).tell,
    )


def _could_not(error: OSError) -> Report:
    return Report(
        outcome=Outcome.FAILED,
        error=f"the server could not check the file: {error.strerror or error}",
        fix="free some space on the server if its disk is full, then check it again",
    )


def _keep_files(version: DatasetVersion, report: Report, output: Path) -> None:
    """Put the files in place, before the row that speaks of them."""
    for name in (ROWS, INDEX, BAD_ROWS) if report.outcome is Outcome.READY else (BAD_ROWS,):
        if (output / name).exists():
            drop_copies(f"{version.directory}/{name}")
            blobs.move_in(output / name, f"{version.directory}/{name}")


def _enter(version: DatasetVersion, report: Report) -> None:
    error = f"{report.error}; {report.fix}" if report.error and report.fix else report.error
    values: dict[str, Any] = {
        "state": State(report.outcome.value),
        "error": _storable(error),
        "kind": report.kind,
        "num_rows": report.num_rows,
        "num_bad_rows": report.num_bad_rows,
        "report": _storable(report.as_dict()),
        "progress": 1.0,
        "checked_at": Now(),
    }
    is_entered = _waiting().filter(pk=version.pk).update(**values)
    if not is_entered and not DatasetVersion.objects.filter(pk=version.pk).exists():
        deletions.add(version.directory)


def _storable(value: Any) -> Any:
    """Return a value without NUL, which PostgreSQL's texts cannot hold."""
    return orjson.loads(orjson.dumps(value).replace(b"\\u0000", b"\\ufffd"))


class _Teller:
    """Enters how far a check is, at most once a second; ends the check of a version that is gone."""

    def __init__(self, version: DatasetVersion) -> None:
        self._rows = _waiting().filter(pk=version.pk)
        self._next_at = 0.0

    def tell(self, progress: Progress) -> None:
        if time.monotonic() < self._next_at:
            return
        self._next_at = time.monotonic() + _TELL_S
        if self._rows.update(progress=progress.share, num_rows=progress.num_rows) == 0:
            raise _Gone
