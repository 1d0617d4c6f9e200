"""Operations that read the files of a checkpoint: the creation of a run from one, and a load into a run.

Such an operation names the folder. The files stay, whatever becomes of the checkpoint's row and name, as long as a worker
has still to read them, or may have to again after a crash (see `services.deletions`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
from django.db.models import F, Q, QuerySet

from runs.models import Checkpoint, Operation
from runs.services import operations
from runs.services.operations import Submission

Kind = Operation.Kind


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


def over() -> QuerySet[Operation]:
    """Return the operations that name a folder still, but will never read it again."""
    return Operation.objects.exclude(loads_from="").filter(_is_over())


def waiting_saves(run_pk: int, *, kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield seq and request of the operations of a run that are going to save weights; `path` is the name."""
    save = Kind.SAVE_WEIGHTS if kind == Checkpoint.Kind.TRAINING else Kind.SAVE_WEIGHTS_FOR_SAMPLER
    waiting = Operation.objects.filter(run_id=run_pk, kind=save, state=Operation.State.QUEUED)
    for seq, payload, payload_file in waiting.values_list("seq", "payload", "payload_file"):
        yield seq, orjson.loads(operations.payload_of(payload, payload_file))


def _is_over() -> Q:
    """The payload of a load goes when no replay can need it, and so may the files (see `expired_operations`)."""
    return Q(state=Operation.State.FAILED) | Q(run__payloads_gone_seq__gte=F("seq"))
