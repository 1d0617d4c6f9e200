"""JSON replies to the SDKs: their shapes as TypedDicts, and functions for the ones with rules.

A result must never carry the keys `error`, `type: "try_again"` or `status: "complete_metadata"` on
top: clients read those as "failed" and "not yet". Keys that are absent may be left out or be null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads typing.TypedDict from Python 3.12 on only

from runs.exceptions import Category

QueueState = Literal["active", "paused_capacity", "paused_rate_limit"]
CheckpointType = Literal["training", "sampler", "external"]


def to_json(reply: Mapping[str, object]) -> bytes:
    """Return the reply as compact JSON. Raises ValueError on NaN and infinity."""
    return json.dumps(reply, separators=(",", ":"), allow_nan=False).encode()


# -- futures ----------------------------------------------------------------------------------------


class UntypedFuture(TypedDict):
    request_id: str
    model_id: NotRequired[str]
    sample_sequence_ids: NotRequired[list[str]]


class TryAgain(TypedDict):
    type: Literal["try_again"]
    request_id: str
    queue_state: QueueState
    queue_state_reason: str | None


class Failure(TypedDict):
    error: str
    category: Category


def untyped_future(
    request_id: str, model_id: str | None = None, *, sample_sequence_ids: Sequence[str] | None = None
) -> UntypedFuture:
    """Return the answer to a submit; asample needs one sequence id for each sample."""
    reply: UntypedFuture = {"request_id": request_id}
    if model_id is not None:
        reply["model_id"] = model_id
    if sample_sequence_ids is not None:
        reply["sample_sequence_ids"] = list(sample_sequence_ids)
    return reply


def try_again(request_id: str, queue_state: QueueState = "active", *, reason: str | None = None) -> TryAgain:
    """Return "not yet": with status 408 clients poll again quietly, with 200 they log a warning."""
    return {
        "type": "try_again",
        "request_id": request_id,
        "queue_state": queue_state,
        "queue_state_reason": reason,
    }


def failure(error: str, category: Category) -> Failure:
    """Return a failed operation, to be sent with status 200; clients raise it and do not retry."""
    return {"error": error, "category": category}


# -- results of operations --------------------------------------------------------------------------


class CreateModelResult(TypedDict):
    type: Literal["create_model"]
    model_id: str


class UnloadModelResult(TypedDict):
    type: Literal["unload_model"]
    model_id: str


class OptimStepResult(TypedDict):
    metrics: dict[str, float] | None


class SaveWeightsResult(TypedDict):
    type: Literal["save_weights"]
    path: str


class SaveWeightsForSamplerResult(TypedDict):
    type: Literal["save_weights_for_sampler"]
    path: str | None
    sampling_session_id: NotRequired[str]


class LoadWeightsResult(TypedDict):
    type: Literal["load_weights"]
    path: str
    model_id: str


def create_model_result(model_id: str) -> CreateModelResult:
    return {"type": "create_model", "model_id": model_id}


def unload_model_result(model_id: str) -> UnloadModelResult:
    return {"type": "unload_model", "model_id": model_id}


def optim_step_result(metrics: Mapping[str, float]) -> OptimStepResult:
    """Return the metrics; those that are not finite are left out, since JSON has no word for them."""
    return {"metrics": {name: float(value) for name, value in metrics.items() if math.isfinite(value)}}


def save_weights_result(path: str) -> SaveWeightsResult:
    return {"type": "save_weights", "path": path}


def save_weights_for_sampler_result(path: str) -> SaveWeightsForSamplerResult:
    return {"type": "save_weights_for_sampler", "path": path}


def ephemeral_sampler_result(sampling_session_id: str) -> SaveWeightsForSamplerResult:
    return {"type": "save_weights_for_sampler", "path": None, "sampling_session_id": sampling_session_id}


def load_weights_result(path: str, *, model_id: str) -> LoadWeightsResult:
    return {"type": "load_weights", "path": path, "model_id": model_id}


# -- immediate answers ------------------------------------------------------------------------------


class SessionCreated(TypedDict):
    type: Literal["create_session"]
    session_id: str
    info_message: NotRequired[str | None]
    warning_message: NotRequired[str | None]
    error_message: NotRequired[str | None]


class SamplingSessionCreated(TypedDict):
    type: Literal["create_sampling_session"]
    sampling_session_id: str


class Heartbeat(TypedDict):
    type: Literal["session_heartbeat"]


class ModelData(TypedDict):
    model_name: str
    arch: NotRequired[str | None]
    tokenizer_id: NotRequired[str | None]


class ModelInfo(TypedDict):
    type: Literal["get_info"]
    model_id: str
    model_data: ModelData
    model_name: str
    is_lora: bool
    lora_rank: int


class WeightsInfoReply(TypedDict):
    base_model: str
    is_lora: bool
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool


class SupportedModel(TypedDict):
    model_name: str
    max_context_length: int
    trainable: bool
    sampleable: bool


class Capabilities(TypedDict):
    supported_models: list[SupportedModel]


class CheckpointReply(TypedDict):
    """SDK 0.22 fails on a list that holds the type `external`."""

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: str
    tinker_path: str
    size_bytes: int | None
    public: bool
    expires_at: str | None
    user_metadata: dict[str, str] | None


class Page(TypedDict):
    offset: int
    limit: int
    total_count: int


class CheckpointList(TypedDict):
    checkpoints: list[CheckpointReply]
    cursor: Page | None


class TrainingRunReply(TypedDict):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool
    lora_rank: int | None
    last_request_time: str
    last_checkpoint: CheckpointReply | None
    last_sampler_checkpoint: CheckpointReply | None
    user_metadata: dict[str, str] | None


class TrainingRunList(TypedDict):
    training_runs: list[TrainingRunReply]
    cursor: Page


class SessionList(TypedDict):
    sessions: list[str]


class SessionReply(TypedDict):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: NotRequired[dict[str, str] | None]
    display_name: NotRequired[str | None]


class SamplerReply(TypedDict):
    sampler_id: str
    base_model: str
    model_path: str | None
