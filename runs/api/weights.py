"""Saving, loading and describing weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Final

from django.db import transaction

from runs import ids
from runs.api.decorators import ApiRequest, Reply, json_reply
from runs.api.sequences import consuming_seq
from runs.api.training import future_reply, submit
from runs.exceptions import NotFound, RequestInvalid
from runs.models import Checkpoint, Operation, TrainingRun, User
from runs.schemas import requests
from runs.schemas.parsing import validate
from runs.services import access, loads, operations, training_runs
from runs.services.operations import Submission
from runs.services.training_runs import Start

Kind = Operation.Kind
_FIRST_SEQ: Final = 1
"""Of what follows a run's creation."""


def save_weights(request: ApiRequest) -> Reply:
    """Submit a save of weights and optimizer state."""
    with consuming_seq(request, Kind.SAVE_WEIGHTS):
        body = validate(requests.SaveWeights, request.body)
        run = access.get_run(request.user, body.model_id)
        payload = requests.canonical_json(body)
        return submit(run, Submission(kind=Kind.SAVE_WEIGHTS, seq=body.seq_id, payload=payload))


def save_weights_for_sampler(request: ApiRequest) -> Reply:
    """Submit a save of weights to sample from, by name or for one sampling session.

    A client that sends an ephemeral save again counts its sampling session on; it is the same request.
    """
    with consuming_seq(request, Kind.SAVE_WEIGHTS_FOR_SAMPLER):
        body = validate(requests.SaveWeightsForSampler, request.body)
        run = access.get_run(request.user, body.model_id)
        submission = Submission(
            kind=Kind.SAVE_WEIGHTS_FOR_SAMPLER,
            seq=body.seq_id,
            payload=requests.canonical_json(body),
            digest_of=requests.request_digest(body).encode(),
        )
        return submit(run, submission)


def load_weights(request: ApiRequest) -> Reply:
    """Submit a load into a run, or make a run from a checkpoint."""
    with consuming_seq(request, Kind.LOAD_WEIGHTS):
        body = validate(requests.LoadWeights, request.body)
        return _create_from(request.user, body) if body.creates_model else _load_into(request.user, body)


def weights_info(request: ApiRequest) -> Reply:
    """Describe a checkpoint so that a client can make a run that fits it."""
    body = validate(requests.WeightsInfo, request.body)
    path = ids.parse_path(body.tinker_path, place="tinker_path")
    run = access.get_readable_checkpoint(request.user, path).run
    return json_reply(
        {
            "base_model": run.base_model,
            "is_lora": True,
            "lora_rank": run.lora_rank,
            "train_unembed": run.train_unembed,
            "train_mlp": run.train_mlp,
            "train_attn": run.train_attn,
        }
    )


def _load_into(user: User, body: requests.LoadWeights) -> Reply:
    assert body.model_id is not None
    assert body.seq_id is not None
    run = access.get_run(user, body.model_id)
    asked = partial(
        loads.submission,
        Kind.LOAD_WEIGHTS,
        seq=body.seq_id,
        path=body.path,
        with_optimizer=body.optimizer,
    )
    # One that comes again is known: what has the name by now may be other weights, or nothing.
    if operations.holds(run, asked()):
        return submit(run, asked())
    checkpoint = _source(user, body)
    _check_fits(run, checkpoint)
    with transaction.atomic():
        if body.seq_id == _FIRST_SEQ:
            training_runs.note_parent(run, Start(checkpoint=checkpoint, with_optimizer=body.optimizer))
        access.lock(checkpoint)  # or its files could go before the log says that they are needed
        return submit(run, asked(directory=checkpoint.directory))


def _create_from(user: User, body: requests.LoadWeights) -> Reply:
    assert body.session_id is not None
    assert body.model_seq_id is not None
    session = access.get_open_session(user, body.session_id)
    made = training_runs.made_before(
        session, model_seq_id=body.model_seq_id, path=body.path, with_optimizer=body.optimizer
    )
    if made is None:
        checkpoint = _source(user, body)
        if body.base_model is not None and body.base_model != checkpoint.run.base_model:
            raise RequestInvalid(
                f"the checkpoint was trained on {checkpoint.run.base_model!r}", place="base_model"
            )
        made = training_runs.create_run(
            session,
            model_seq_id=body.model_seq_id,
            base_model=checkpoint.run.base_model,
            lora=training_runs.lora_of(checkpoint),
            user_metadata=body.user_metadata,
            start=Start(checkpoint=checkpoint, with_optimizer=body.optimizer),
        )
    run, operation_pk = made
    return future_reply(operation_pk, run)


def _source(user: User, body: requests.LoadWeights) -> Checkpoint:
    """Return the checkpoint to load: the user's, a published one, or one that `weights_access_token` opens."""
    path = ids.parse_path(body.path)
    try:
        checkpoint = access.get_readable_checkpoint_for(user, path, token=body.weights_access_token)
    except NotFound:
        if any(_saves_to_come(user, path)):
            raise _unsaved(path) from None
        raise
    if path.run_id == body.model_id:
        _refuse_outdated(user, body, path)
    if body.optimizer and checkpoint.kind != Checkpoint.Kind.TRAINING:
        raise RequestInvalid(
            "sampler weights hold no optimizer state; load them with optimizer=false", place="path"
        )
    return checkpoint


def _refuse_outdated(user: User, body: requests.LoadWeights, path: ids.CheckpointPath) -> None:
    """Refuse to load what the run itself was told before to overwrite: the files are still those of before."""
    assert body.seq_id is not None
    for seq, request in _saves_to_come(user, path):
        if seq < body.seq_id and request.get("overwrite"):
            raise _unsaved(path)


def _saves_to_come(user: User, path: ids.CheckpointPath) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield seq and request of the waiting saves to a path of the user's own."""
    for run in access.runs_of(user).filter(public_id=path.run_id):
        for seq, request in loads.waiting_saves(run.pk, kind=path.kind):
            if request.get("path") == path.name:
                yield seq, request


def _unsaved(path: ids.CheckpointPath) -> RequestInvalid:
    return RequestInvalid(
        f"{path.name!r} is still to be saved; load it when its save has been answered", place="path"
    )


def _check_fits(run: TrainingRun, checkpoint: Checkpoint) -> None:
    """Refuse weights of another shape than the run's.

    Raises:
        RequestInvalid: base model, rank or the trained parts differ.
    """
    theirs = checkpoint.run
    if theirs.base_model != run.base_model:
        raise RequestInvalid(
            f"the checkpoint was trained on {theirs.base_model!r}, this run trains {run.base_model!r}",
            place="path",
        )
    if theirs.lora_rank != run.lora_rank:
        raise RequestInvalid(
            f"the checkpoint has rank {theirs.lora_rank}, this run has {run.lora_rank}", place="path"
        )
    for part in ("train_attn", "train_mlp", "train_unembed"):
        if getattr(theirs, part) != getattr(run, part):
            raise RequestInvalid(
                f"the checkpoint was trained with {part}={getattr(theirs, part)}, this run is not",
                place="path",
            )
