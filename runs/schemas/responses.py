"""JSON replies to the SDKs about operations: their shapes as TypedDicts, and functions that make them.

A result must never carry the keys `error`, `type: "try_again"` or `status: "complete_metadata"` on
top: clients read those as "failed" and "not yet". Keys that are absent may be left out or be null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads typing.TypedDict from Python 3.12 on only

QueueState = Literal["active", "paused_capacity", "paused_rate_limit"]


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
