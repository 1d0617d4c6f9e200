"""Folders of checkpoints and snapshots that no row names and none ever will: their worker died in between.

A folder's name carries the fence of the run's owner that wrote it (see `gpuworker.snapshots`). Once the run has a
higher one, that owner can enter nothing more, so that what it left without a row is of no use. A run that nobody
holds gets a higher one here, if its last owner left something. Folders whose rows were deleted are
`services.deletions`' first; what is left of them on a disk goes here, too. In a bucket nothing is looked for.
"""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Final

from django.core.files.storage import FileSystemStorage, default_storage, storages

from runs.models import Checkpoint, Snapshot, TrainingRun
from runs.services import blobs, loads

_ROWS: Final[dict[str, type[Checkpoint] | type[Snapshot]]] = {
    "checkpoints": Checkpoint,
    "snapshots": Snapshot,
}
# A state that is still being written has a dot before its name and something random behind it.
_NAME: Final = re.compile(r"\.?\d+-(?P<fence>\d+)-[0-9a-f]{8}(\..*)?")
NUM_TURNS: Final = 30
_TURN_S: Final = 60


def delete_orphans(*, turn: int | None = None) -> int:
    """Look at the folders of some runs, of others at each minute, so that all are seen within half an hour.

    Returns how many folders were removed. `turn` is that of the minute unless given.
    """
    if not isinstance(storages["default"], FileSystemStorage):
        return 0  # written there from a temporary folder; a listing of a whole bucket is dear
    if turn is None:
        turn = int(time.time() / _TURN_S) % NUM_TURNS
    return sum(_delete_orphans(kind, folder) for kind in _ROWS for folder in _folders_of_runs(kind, turn))


def _folders_of_runs(kind: str, turn: int) -> list[Path]:
    root = Path(default_storage.path(kind))
    if not root.is_dir():
        return []
    named = (folder for folder in root.iterdir() if folder.name.isdecimal())
    return [folder for folder in named if int(folder.name) % NUM_TURNS == turn]


def _delete_orphans(kind: str, folder: Path) -> int:
    run_pk = int(folder.name)
    orphans = {f"{kind}/{run_pk}/{path.name}" for path in folder.iterdir()}
    fence = TrainingRun.objects.filter(pk=run_pk).values_list("fence", flat=True).first()
    if fence is not None:
        if any(_fence_of(name) == fence for name in orphans - _named(kind, run_pk)):
            fence += _raise_fence(run_pk, fence)
        # First the fence, then the rows: what was entered under an older fence is there to be seen by now.
        orphans = {name for name in orphans - _named(kind, run_pk) if _fence_of(name) < fence}
    # Last the loads: whoever asked for one of a row that is gone by now has entered it.
    orphans -= set(loads.to_come(f"{kind}/{run_pk}").values_list("loads_from", flat=True))
    num_removed = sum(blobs.delete_folder(name) for name in orphans)
    if fence is None:
        with contextlib.suppress(OSError):  # something is left in it
            folder.rmdir()
    return num_removed


def _named(kind: str, run_pk: int) -> set[str]:
    return set(_ROWS[kind].objects.filter(run_id=run_pk).values_list("directory", flat=True))


def _raise_fence(run_pk: int, fence: int) -> int:
    """End what the last owner of a run may enter; returns by how much, 0 when somebody holds the run."""
    free = TrainingRun.objects.filter(pk=run_pk, fence=fence, worker=None)
    return free.update(fence=fence + 1)


def _fence_of(name: str) -> float:
    """Return the fence in a folder's name; infinity for a name of another form, which is left alone."""
    match = _NAME.fullmatch(name.rpartition("/")[2])
    return int(match["fence"]) if match else float("inf")
