"""Saving, loading and describing weights."""

from __future__ import annotations

import json

from runs import ids
from runs.api.decorators import ApiRequest, Reply, json_reply
from runs.api.sequences import consuming_seq
from runs.api.training import future_reply, submit
from runs.exceptions import NotFound, RequestInvalid
from runs.models import Checkpoint, Operation, User
from runs.schemas import requests
from runs.schemas.parsing import validate
from runs.services import access, operations, training_runs
from runs.services.operations import Submission
from runs.services.training_runs import Start

Kind = Operation.Kind


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
    run = access.get_run(user, body.model_id)
    try:
        submission = _load(body, directory=_source(user, body).directory)
    except NotFound:
        submission = _load(body, directory="")  # the log has the folder, if this came when it was there
        if not operations.holds(run, submission):
            raise
    return submit(run, submission)


def _load(body: requests.LoadWeights, *, directory: str) -> Submission:
    """Return the operation; the folder, which is another once the name is saved anew, does not tell requests apart."""
    assert body.seq_id is not None
    content = {"directory": directory, "path": body.path, "optimizer": body.optimizer}
    return Submission(
        kind=Kind.LOAD_WEIGHTS,
        seq=body.seq_id,
        payload=json.dumps(content, separators=(",", ":")).encode(),
        digest_of=requests.request_digest(body).encode(),
    )


def _create_from(user: User, body: requests.LoadWeights) -> Reply:
    assert body.session_id is not None
    assert body.model_seq_id is not None
    session = access.get_open_session(user, body.session_id)
    checkpoint = _source(user, body)
    if body.base_model is not None and body.base_model != checkpoint.run.base_model:
        raise RequestInvalid(
            f"the checkpoint was trained on {checkpoint.run.base_model!r}", place="base_model"
        )
    run, operation_pk = training_runs.create_run(
        session,
        model_seq_id=body.model_seq_id,
        base_model=checkpoint.run.base_model,
        lora=training_runs.lora_of(checkpoint),
        user_metadata=body.user_metadata,
        start=Start(checkpoint=checkpoint, path=body.path, with_optimizer=body.optimizer),
    )
    return future_reply(operation_pk, run)


def _source(user: User, body: requests.LoadWeights) -> Checkpoint:
    """Return the checkpoint to load: the user's, a published one, or one that `weights_access_token` opens."""
    checkpoint = access.get_readable_checkpoint_for(
        user, ids.parse_path(body.path), token=body.weights_access_token
    )
    if body.optimizer and checkpoint.kind != Checkpoint.Kind.TRAINING:
        raise RequestInvalid(
            "sampler weights hold no optimizer state; load them with optimizer=false", place="path"
        )
    return checkpoint
