"""Sampling sessions and sample requests."""

from __future__ import annotations

from runs import ids
from runs.api.decorators import ApiRequest, Reply, json_reply
from runs.exceptions import RequestInvalid
from runs.models import Operation
from runs.schemas import requests, responses
from runs.schemas import sampling as schemas
from runs.schemas.parsing import validate
from runs.services import access, base_models, operations, sampling
from runs.services.operations import Submission


def create_sampling_session(request: ApiRequest) -> Reply:
    """Open a sampling session on a checkpoint or a bare base model."""
    body = validate(schemas.CreateSamplingSession, request.body)
    session = access.get_open_session(request.user, body.session_id)
    checkpoint = None
    if body.model_path:
        path = ids.parse_path(body.model_path, place="model_path")
        checkpoint = access.get_readable_checkpoint(request.user, path)
    elif not body.base_model:
        raise RequestInvalid("give base_model or model_path", place="model_path")
    made = sampling.create_sampling_session(
        session, seq_id=body.sampling_session_seq_id, base_model=body.base_model, checkpoint=checkpoint
    )
    return json_reply({"type": "create_sampling_session", "sampling_session_id": made.public_id})


def asample(request: ApiRequest) -> Reply:
    """Submit a sample request."""
    body = validate(schemas.Sample, request.body)
    session = access.get_readable_sampling_session(request.user, body.sampling_session_id)
    info = base_models.find(session.base_model)
    if info and info.is_loaded:
        schemas.check_prompt(body, vocab_size=info.vocab_size, max_context=info.max_context)
    submission = Submission(
        kind=Operation.Kind.SAMPLE, seq=body.seq_id, payload=requests.canonical_json(body)
    )
    operation_pk = operations.submit_sample(session, submission)
    sequence_ids = [f"op-{operation_pk}-{index}" for index in range(body.num_samples)]
    return json_reply(dict(responses.untyped_future(f"op-{operation_pk}", sample_sequence_ids=sequence_ids)))


def get_sampler(request: ApiRequest) -> Reply:
    """Describe a sampling session."""
    session = access.get_sampling_session(request.user, request.path_args["sampler_id"])
    return json_reply(
        {
            "sampler_id": session.public_id,
            "base_model": session.base_model,
            "model_path": session.model_path or None,
        }
    )
