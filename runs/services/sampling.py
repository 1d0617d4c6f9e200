"""Sampling sessions: fixed weights to sample from, and the text samples of a run."""

from __future__ import annotations

from runs import ids
from runs.exceptions import RequestInvalid
from runs.models import Checkpoint, Operation, SamplingSession, Session, TrainingRun
from runs.services import base_models


def create_sampling_session(
    session: Session, *, seq_id: int, base_model: str | None, checkpoint: Checkpoint | None
) -> SamplingSession:
    """Open a sampling session on a checkpoint or on the bare base model; a retry returns the first.

    Raises:
        RequestInvalid: the base model is not offered, or the number holds other weights.
    """
    model = checkpoint.run.base_model if checkpoint is not None else (base_model or "")
    base_models.get(model)
    model_path = path_of(checkpoint) if checkpoint else ""
    made, _ = SamplingSession.objects.get_or_create(
        session=session,
        seq_id=seq_id,
        defaults={
            "public_id": ids.sampling_session_id(session.public_id, seq_id),
            "owner_id": session.owner_id,
            "base_model": model,
            "checkpoint": checkpoint,
            "run": checkpoint.run if checkpoint and checkpoint.owner_id == session.owner_id else None,
            "model_path": model_path,
        },
    )
    if (made.base_model, made.model_path) != (model, model_path):
        raise RequestInvalid(
            f"{seq_id} already samples from {made.model_path or made.base_model}",
            place="sampling_session_seq_id",
        )
    return made


def path_of(checkpoint: Checkpoint) -> str:
    """Return a checkpoint's tinker:// path."""
    return str(ids.CheckpointPath(checkpoint.run.public_id, checkpoint.kind, checkpoint.name))


def samples_of(run: TrainingRun, *, limit: int) -> list[Operation]:
    """Return the run's latest finished samples that are not of its fixed prompts, with what they ran on."""
    rows = Operation.objects.filter(
        sampling_session__run=run, kind=Operation.Kind.SAMPLE, state=Operation.State.DONE, fixedsample=None
    )
    return list(rows.select_related("sampling_session__checkpoint").order_by("-id")[:limit])
