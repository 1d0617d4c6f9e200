"""Why something is not done yet, in words for the user's terminal and the run's page."""

from __future__ import annotations

from typing import Final

from django.db.models import Exists, OuterRef

from runs.models import Operation, TrainingRun
from runs.services import base_models, holdups, operations, workers

NO_WORKER: Final = "no GPU worker is running; the operation is safe and starts when one is back"
ALL_DRAINED: Final = (
    "every GPU worker that has the base model is drained and takes no runs; "
    "the operation is safe and starts when one is resumed or another comes"
)


def reason_of(operation: Operation) -> str:
    """Return why an operation has no answer yet; empty when it is just its turn."""
    run, session = operation.run, operation.sampling_session
    base_model = run.base_model if run is not None else session.base_model if session is not None else ""
    if run is None:
        return _without_worker(base_model) or _drained(base_model, operation.worker_id)
    run.refresh_from_db(fields=["applied_seq", "num_replayed", "num_to_replay", "worker"])
    return (
        _without_worker(base_model)
        or _drained(base_model, run.worker_id)
        or holdups.reason_of(run)
        or _recovering(run)
        or _gap_before(run, operation.seq)
        or _queued(run)
    )


def reason_of_run(run: TrainingRun) -> str:
    """Return why a run with waiting operations does not go on; empty when it does."""
    return _without_worker(run.base_model) or _drained(run.base_model, run.worker_id) or _queued(run)


def _without_worker(base_model: str) -> str:
    if not workers.live().exists():
        return NO_WORKER
    if workers.having(base_model).exists():
        return ""
    info = base_models.find(base_model)
    if info is None or info.error:
        error = f": {info.error}" if info else ""
        return f"no worker has the base model {base_model!r}{error}"
    return f"the worker is still loading {base_model!r}; the operation is safe and starts once it is loaded"


def _drained(base_model: str, holder_pk: int | None) -> str:
    """What a live worker has it finishes, or lets go in a moment."""
    holders = workers.live().filter(fingerprint__has_key=base_model)
    found = list(holders.values_list("pk", "drain_asked_at"))
    if not found or any(pk == holder_pk or asked_at is None for pk, asked_at in found):
        return ""
    return ALL_DRAINED


def _recovering(run: TrainingRun) -> str:
    if not run.num_to_replay:
        return ""
    return f"recovering: replaying {run.num_replayed} of {run.num_to_replay} operations; nothing is lost"


def _gap_before(run: TrainingRun, seq: int) -> str:
    rows = Operation.objects.filter(run=run, seq__gt=run.applied_seq, seq__lte=seq).order_by("seq")
    expected = run.applied_seq + 1
    for found in rows.values_list("seq", flat=True)[:1000]:
        if found != expected:
            return (
                f"waiting for seq_id {expected}, which has not arrived; it is given up "
                f"{operations.GAP_PATIENCE_S} s after a later one came"
            )
        expected += 1
    return ""


def _queued(run: TrainingRun) -> str:
    """A run that no worker has taken yet, or whose worker was lost a moment ago, waits behind those with work."""
    if run.worker_id and workers.live().filter(pk=run.worker_id).exists():
        return ""
    waiting = Operation.objects.filter(run=OuterRef("pk"), state=Operation.State.QUEUED)
    others = TrainingRun.objects.filter(Exists(waiting), base_model=run.base_model).exclude(pk=run.pk)
    number = others.count()
    return f"queued behind {number} run{'' if number == 1 else 's'}" if number else ""
