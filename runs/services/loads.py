"""Operations that read the files of a checkpoint: the creation of a run from one, and a load into a run.

Such an operation names the folder. The files stay, whatever becomes of the checkpoint's row and name, until the run has
a state of its own that was kept after the load: until then a worker has to read them, or may have to again after a crash.
"""

from __future__ import annotations

from typing import Any, Final

import orjson
from django.db.models import Exists, OuterRef, Q, QuerySet

from runs.models import Checkpoint, Operation, Snapshot, TrainingRun
from runs.services import blobs, operations
from runs.services.operations import Submission

Kind = Operation.Kind
_BATCH: Final = 500


def submission(kind: str, *, seq: int, path: str, with_optimizer: bool, directory: str = "") -> Submission:
    """Return the operation; the folder, which is another once the name is saved anew, does not tell requests apart."""
    asked = {"path": path, "optimizer": with_optimizer}
    content: dict[str, Any] = {"directory": directory, **asked}
    return Submission(
        kind=kind,
        seq=seq,
        payload=orjson.dumps({"load": content} if kind == Kind.CREATE_MODEL else content),
        digest_of=orjson.dumps(asked),
        loads_from=directory,
    )


def to_come(folder: str) -> QuerySet[Operation]:
    """Return the operations that have still to read files of a folder, or of those below it, or may have to again."""
    named = Operation.objects.exclude(loads_from="")
    return named.filter(Q(loads_from=folder) | Q(loads_from__startswith=f"{folder}/")).exclude(_is_over())


def delete_files(*folders: str) -> None:
    """Delete folders whose rows are gone, but those that have still to be read: `let_go` deletes them in time."""
    for folder in folders:
        if not to_come(folder).exists():
            blobs.delete_folder(folder)


def let_go() -> None:
    """Forget which folders were read by loads that are over, and delete those that no checkpoint has any more."""
    loads = Operation.objects.exclude(loads_from="").filter(_is_over())
    over = dict(loads.values_list("pk", "loads_from")[:_BATCH])
    delete_files(*(folder for folder in set(over.values()) if not is_named(folder)))
    Operation.objects.filter(pk__in=over).update(loads_from="")


def is_named(folder: str) -> bool:
    """Say whether a checkpoint has its files there."""
    run_pk = folder.split("/")[1]  # see `gpuworker.snapshots.new_directory`
    return Checkpoint.objects.filter(run_id=int(run_pk), directory=folder).exists()


def is_being_saved(run_pk: int, *, kind: str, name: str, before_seq: int | None = None) -> bool:
    """Say whether a waiting operation of a run, before this seq if that is given, saves weights under this name."""
    save = Kind.SAVE_WEIGHTS if kind == Checkpoint.Kind.TRAINING else Kind.SAVE_WEIGHTS_FOR_SAMPLER
    waiting = Operation.objects.filter(run_id=run_pk, kind=save, state=Operation.State.QUEUED)
    if before_seq is not None:
        waiting = waiting.filter(seq__lt=before_seq)
    payloads = [operations.payload_of(*one) for one in waiting.values_list("payload", "payload_file")]
    return any(orjson.loads(payload).get("path") == name for payload in payloads)


def _is_over() -> Q:
    kept = Snapshot.objects.filter(run=OuterRef("run"), seq__gte=OuterRef("seq"))
    return Q(Exists(kept)) | Q(state=Operation.State.FAILED) | ~Q(run__state=TrainingRun.State.OPEN)
