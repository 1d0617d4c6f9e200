"""Training calls: validated here against the model, made durable, answered with a request id."""

from __future__ import annotations

from runs.api.decorators import ApiRequest, Reply, json_reply
from runs.api.sequences import consuming_seq
from runs.models import Operation, TrainingRun
from runs.schemas import forward_backward as fb
from runs.schemas import requests, responses
from runs.schemas.parsing import validate
from runs.services import access, base_models, operations, training_runs
from runs.services.operations import Submission
from runs.services.training_runs import Lora

Kind = Operation.Kind


def create_model(request: ApiRequest) -> Reply:
    """Make a run."""
    body = validate(requests.CreateModel, request.body)
    session = access.get_open_session(request.user, body.session_id)
    config = body.lora_config
    run, operation_pk = training_runs.create_run(
        session,
        model_seq_id=body.model_seq_id,
        base_model=body.base_model,
        lora=Lora(
            rank=config.rank,
            seed=config.seed,
            train_attn=config.train_attn,
            train_mlp=config.train_mlp,
            train_unembed=config.train_unembed,
        ),
        user_metadata=body.user_metadata,
    )
    return future_reply(operation_pk, run)


def get_info(request: ApiRequest) -> Reply:
    """Describe a run's model; `tokenizer_id` is a folder when client and server share the machine."""
    body = validate(requests.GetInfo, request.body)
    run = access.get_run(request.user, body.model_id)
    info = base_models.find(run.base_model)
    data = {
        "arch": (info.architecture if info else "") or None,
        "model_name": run.base_model,
        "tokenizer_id": info.tokenizer_id if info else None,
    }
    return json_reply(
        {
            "type": "get_info",
            "model_id": run.public_id,
            "model_data": data,
            "model_name": run.base_model,
            "is_lora": True,
            "lora_rank": run.lora_rank,
        }
    )


def forward(request: ApiRequest) -> Reply:
    """Submit a forward (0.22)."""
    with consuming_seq(request, Kind.FORWARD):
        return _forward(request)


def forward_backward(request: ApiRequest) -> Reply:
    """Submit a forward_backward; 0.38 asks for a forward here too."""
    with consuming_seq(request, Kind.FORWARD_BACKWARD):
        return _forward(request)


def optim_step(request: ApiRequest) -> Reply:
    """Submit an optimizer step."""
    with consuming_seq(request, Kind.OPTIM_STEP):
        body = validate(requests.OptimStep, request.body)
        run = access.get_run(request.user, body.model_id)
        payload = requests.canonical_json(body)
        return submit(run, Submission(kind=Kind.OPTIM_STEP, seq=body.seq_id, payload=payload))


def unload_model(request: ApiRequest) -> Reply:
    """Close a run after what was submitted before."""
    body = validate(requests.UnloadModel, request.body)
    run = access.get_run(request.user, body.model_id)
    return future_reply(operations.unload(run), run)


def submit(run: TrainingRun, submission: Submission) -> Reply:
    """Enter an operation into the log and answer with its request id."""
    return future_reply(operations.submit(run, submission), run)


def future_reply(operation_pk: int, run: TrainingRun) -> Reply:
    """Answer with what the client polls for."""
    return json_reply(dict(responses.untyped_future(f"op-{operation_pk}", run.public_id)))


def _forward(request: ApiRequest) -> Reply:
    payload = (
        fb.parse_proto_request(request.body) if request.is_proto else fb.parse_json_request(request.body)
    )
    run = access.get_run(request.user, payload.model_id)
    _check_fits(run, payload)
    kind = Kind.FORWARD if payload.forward_only else Kind.FORWARD_BACKWARD
    submission = Submission(
        kind=kind, seq=payload.seq_id, payload=fb.to_bytes(payload), num_tokens=payload.num_tokens
    )
    return submit(run, submission)


def _check_fits(run: TrainingRun, payload: fb.ForwardBackwardPayload) -> None:
    info = base_models.find(run.base_model)
    if info and info.is_loaded:
        fb.check_tokens(payload, vocab_size=info.vocab_size, max_context=info.max_context)
