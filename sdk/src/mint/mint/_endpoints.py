"""The two operations that MinT servers have and tinker does not."""

from __future__ import annotations

import time
from typing import Any, Literal, TypeVar

import tinker
from pydantic import BaseModel, ConfigDict, field_validator
from tinker import types
from tinker.lib.api_future_impl import _APIFuture
from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

from mint.future import Future, submitted

Response = TypeVar("Response", bound=BaseModel)


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore")


class TensorData(_Wire):
    """A tensor as it is sent: flat data, shape and type."""

    data: list[int] | list[float] | float
    shape: list[int] | None = None
    dtype: str = "float32"


class ReverseKLDatum(_Wire):
    """One sequence, as the student and as the reference model see it."""

    student_input: types.ModelInput
    reference_input: types.ModelInput
    target_tokens: TensorData
    weights: TensorData

    @field_validator("target_tokens", "weights", mode="before")
    @classmethod
    def _from_tinker(cls, value: Any) -> Any:
        if isinstance(value, types.TensorData):
            return {"data": value.data, "shape": value.shape, "dtype": value.dtype}
        return value


class ForwardBackwardReverseKLRequest(_Wire):
    """The body of a reverse-KL operation."""

    model_id: str
    reference_model_path: str
    data: list[ReverseKLDatum]
    temperature: float = 1.0
    seq_id: int | None = None
    type: Literal["mint_forward_backward_reverse_kl"] = "mint_forward_backward_reverse_kl"


class ReverseKLItemOutput(_Wire):
    """The loss of one datum."""

    loss: TensorData


class ForwardBackwardReverseKLResponse(_Wire):
    """The result of a reverse-KL operation."""

    outputs: list[ReverseKLItemOutput]
    metrics: dict[str, float]
    type: Literal["mint_forward_backward_reverse_kl"] = "mint_forward_backward_reverse_kl"


class InterpolateCheckpointsRequest(_Wire):
    """The body of an interpolation."""

    source_paths: list[str]
    coefficients: list[float]
    output_path: str | None = None
    output_checkpoint_type: Literal["sampler"] = "sampler"
    type: Literal["mint_interpolate_checkpoints"] = "mint_interpolate_checkpoints"


class InterpolateCheckpointsResponse(_Wire):
    """The checkpoint that an interpolation made."""

    path: str
    checkpoint_type: Literal["sampler"] = "sampler"
    source_paths: list[str]
    coefficients: list[float]
    has_rank_shards: bool = False
    type: Literal["mint_interpolate_checkpoints"] = "mint_interpolate_checkpoints"


def forward_backward_reverse_kl_async(
    training_client: tinker.TrainingClient,
    *,
    reference_model_path: str,
    data: list[ReverseKLDatum],
    temperature: float = 1.0,
    seq_id: int | None = None,
) -> Future[ForwardBackwardReverseKLResponse]:
    """Submit a backward pass of KL(student || reference) and return its Future.

    Args:
        reference_model_path: checkpoint of the reference model.
        seq_id: place in the order of the run's operations; without one the server picks it.
    """

    def submit() -> Future[ForwardBackwardReverseKLResponse]:
        request = ForwardBackwardReverseKLRequest(
            model_id=str(training_client.model_id),
            reference_model_path=reference_model_path,
            data=data,
            temperature=temperature,
            seq_id=seq_id,
        )
        return _post(
            training_client.holder,
            "/api/v1/mint/forward_backward_reverse_kl",
            request,
            ForwardBackwardReverseKLResponse,
            "MintForwardBackwardReverseKL",
        )

    return submitted(submit)


def forward_backward_reverse_kl(
    training_client: tinker.TrainingClient, **kwargs: Any
) -> ForwardBackwardReverseKLResponse:
    """Run `forward_backward_reverse_kl_async(...)` and wait for the result."""
    return forward_backward_reverse_kl_async(training_client, **kwargs).result()


def interpolate_checkpoints_async(
    service_client: tinker.ServiceClient,
    *,
    source_paths: list[str],
    coefficients: list[float],
    output_path: str | None = None,
    output_checkpoint_type: Literal["sampler"] = "sampler",
) -> Future[InterpolateCheckpointsResponse]:
    """Submit a weighted sum of checkpoints and return the Future of the new checkpoint.

    Args:
        coefficients: one per source path.
        output_path: name of the result; without one the server picks it.
    """

    def submit() -> Future[InterpolateCheckpointsResponse]:
        request = InterpolateCheckpointsRequest(
            source_paths=source_paths,
            coefficients=coefficients,
            output_path=output_path,
            output_checkpoint_type=output_checkpoint_type,
        )
        return _post(
            service_client.holder,
            "/api/v1/mint/checkpoints/interpolate",
            request,
            InterpolateCheckpointsResponse,
            "MintInterpolateCheckpoints",
        )

    return submitted(submit)


def interpolate_checkpoints(
    service_client: tinker.ServiceClient, **kwargs: Any
) -> InterpolateCheckpointsResponse:
    """Run `interpolate_checkpoints_async(...)` and wait for the result."""
    return interpolate_checkpoints_async(service_client, **kwargs).result()


def _post(
    holder: Any, path: str, request: BaseModel, response_type: type[Response], request_type: str
) -> Future[Response]:
    body = request.model_dump(mode="json")
    started_at = time.time()

    async def send() -> types.UntypedAPIFuture:
        with holder.aclient(ClientConnectionPoolType.TRAIN) as client:
            return await client.post(path, body=body, cast_to=types.UntypedAPIFuture)

    async def run() -> Response:
        untyped = await holder.execute_with_retries(send)
        return await _APIFuture(
            response_type, holder, untyped, request_start_time=started_at, request_type=request_type
        ).result_async()

    return Future(holder.run_coroutine_threadsafe(run()).future())
