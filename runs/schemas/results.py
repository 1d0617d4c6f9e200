"""Results of forward, forward_backward and sample: stored as protobuf, as JSON only for who asks.

Axes: N input tokens of one datum, K targets per position.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from runs.schemas import tinker_pb2 as pb
from runs.schemas.tensors import Float32Array, Int64Array

OUTPUT_TYPE = "ArrayRecord"
FIELD = "logprobs"
# What clients read as "no token here" in the top-k matrices.
FILLER_LOGPROB = -99999.0

StopReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledSequence:
    """Generated tokens, each with its log-probability."""

    tokens: Int64Array
    logprobs: Float32Array
    stop_reason: StopReason


@dataclass(frozen=True, kw_only=True, eq=False)
class TopkLogprobs:
    """The k likeliest tokens per prompt position, best first.

    Shapes:
        token_ids, logprobs: (n, k); a position without any holds 0 and -99999.
    """

    token_ids: Int64Array
    logprobs: Float32Array


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleOutput:
    """`prompt_logprobs` is NaN where there is none; both prompt fields are None unless asked for."""

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: Float32Array | None = None
    topk_prompt_logprobs: TopkLogprobs | None = None


def encode_forward_backward(logprobs: Sequence[npt.NDArray[Any]], metrics: Mapping[str, float]) -> bytes:
    """Return the ForwardBackwardOutput that both SDKs decode, one entry per datum in order.

    Shapes:
        logprobs: each (N,) or (N, K).
    Raises:
        ValueError: a value is not finite, or a metric's name has not exactly one colon (clients raise on it).
    """
    for name, value in metrics.items():
        if name.count(":") != 1 or not math.isfinite(value):
            raise ValueError(f"metric {name!r} must be finite and named name:reduction, got {value}")
    output = pb.ForwardBackwardOutput(loss_fn_output_type=OUTPUT_TYPE, metrics=metrics)
    for trailing_shape, run in itertools.groupby(logprobs, key=lambda array: array.shape[1:]):
        _add_record(output, list(run), trailing_shape)
    return output.SerializeToString(deterministic=True)


def decode_forward_backward(stored: bytes) -> tuple[list[Float32Array], dict[str, float]]:
    """Return the log-probabilities of each datum, and the metrics."""
    output = pb.ForwardBackwardOutput.FromString(stored)
    arrays = [array for record in output.loss_fn_outputs for array in _record_arrays(record.fields[FIELD])]
    return arrays, dict(output.metrics)


def has_mixed_shapes(stored: bytes) -> bool:
    """Return whether the result mixes (N,) and (N, K), which SDK 0.22 misreads in protobuf.

    It takes the first shape for all. Answer it in JSON, which its Accept header allows; 0.38 does not.
    """
    return len(pb.ForwardBackwardOutput.FromString(stored).loss_fn_outputs) > 1


def render_forward_backward_json(stored: bytes) -> bytes:
    """Return the stored result as the JSON body of SDK 0.22."""
    logprobs, metrics = decode_forward_backward(stored)
    outputs = [
        {FIELD: {"data": array.ravel().tolist(), "dtype": "float32", "shape": list(array.shape)}}
        for array in logprobs
    ]
    return _to_json({"loss_fn_output_type": OUTPUT_TYPE, "loss_fn_outputs": outputs, "metrics": metrics})


def encode_sample(output: SampleOutput) -> bytes:
    """Return the SampleResponse that both SDKs decode.

    Raises:
        ValueError: a log-probability of a generated token is not finite.
    """
    response = pb.SampleResponse()
    for sequence in output.sequences:
        if not np.isfinite(sequence.logprobs).all():
            raise ValueError("the logprobs of a sampled sequence are not finite")
        response.sequences.add(
            stop_reason=_STOP_CODES[sequence.stop_reason],
            tokens=_packed(sequence.tokens, "<i4"),
            logprobs=_packed(sequence.logprobs, "<f4"),
        )
    if output.prompt_logprobs is not None:
        response.prompt_logprobs = _packed(output.prompt_logprobs, "<f4")
    topk = output.topk_prompt_logprobs
    if topk is not None:
        length, k = topk.token_ids.shape
        response.topk_prompt_logprobs.CopyFrom(
            pb.TopkLogprobs(
                token_ids=_packed(topk.token_ids, "<i4"),
                logprobs=_packed(topk.logprobs, "<f4"),
                k=k,
                length=length,
            )
        )
    return response.SerializeToString(deterministic=True)


def decode_sample(stored: bytes) -> SampleOutput:
    """Return what `encode_sample` was given."""
    response = pb.SampleResponse.FromString(stored)
    sequences = tuple(
        SampledSequence(
            tokens=_int32s(sequence.tokens),
            logprobs=_float32s(sequence.logprobs),
            stop_reason=_STOP_REASONS[sequence.stop_reason],
        )
        for sequence in response.sequences
    )
    return SampleOutput(
        sequences=sequences,
        prompt_logprobs=_float32s(response.prompt_logprobs) if response.HasField("prompt_logprobs") else None,
        topk_prompt_logprobs=(
            _read_topk(response.topk_prompt_logprobs) if response.HasField("topk_prompt_logprobs") else None
        ),
    )


def render_sample_json(stored: bytes) -> bytes:
    """Return the stored result as the JSON body of SDK 0.22; what is absent is null."""
    output = decode_sample(stored)
    sequences = [
        {
            "stop_reason": sequence.stop_reason,
            "tokens": sequence.tokens.tolist(),
            "logprobs": sequence.logprobs.tolist(),
        }
        for sequence in output.sequences
    ]
    prompt_logprobs, topk = output.prompt_logprobs, output.topk_prompt_logprobs
    return _to_json(
        {
            "type": "sample",
            "sequences": sequences,
            "prompt_logprobs": None if prompt_logprobs is None else _null_for_nan(prompt_logprobs),
            "topk_prompt_logprobs": None if topk is None else list(_topk_rows(topk)),
        }
    )


_STOP_CODES: dict[StopReason, pb.StopReason] = {
    "stop": pb.StopReason.STOP_REASON_STOP,
    "length": pb.StopReason.STOP_REASON_LENGTH,
}
_STOP_REASONS: dict[int, StopReason] = {int(code): reason for reason, code in _STOP_CODES.items()}


def _add_record(
    output: pb.ForwardBackwardOutput, arrays: Sequence[npt.NDArray[Any]], trailing_shape: Sequence[int]
) -> None:
    """Add one record for neighbours of one trailing shape: a record cannot hold (N,) beside (N, K)."""
    packed = [_packed(array, "<f4") for array in arrays]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("the logprobs of a datum are not finite")
    offsets = np.cumsum([0, *map(len, packed)], dtype="<i8")
    record = output.loss_fn_outputs.add(type_tag=OUTPUT_TYPE, num_datums=len(packed))
    tensor = record.fields[FIELD]
    tensor.data = b"".join(packed)
    tensor.offsets = offsets.tobytes()
    tensor.dtype = pb.DType.DTYPE_FLOAT32
    tensor.trailing_shape.extend(trailing_shape)


def _record_arrays(tensor: pb.BatchedTensor) -> Iterator[Float32Array]:
    values = _float32s(tensor.data)
    offsets = np.frombuffer(tensor.offsets, dtype="<i8") // values.itemsize
    trailing_shape = tuple(tensor.trailing_shape)
    for start, end in itertools.pairwise(offsets.tolist()):
        yield values[start:end].reshape(-1, *trailing_shape)


def _read_topk(topk: pb.TopkLogprobs) -> TopkLogprobs:
    return TopkLogprobs(
        token_ids=_int32s(topk.token_ids).reshape(topk.length, topk.k),
        logprobs=_float32s(topk.logprobs).reshape(topk.length, topk.k),
    )


def _topk_rows(topk: TopkLogprobs) -> Iterator[list[list[float]] | None]:
    for ids, logprobs in zip(topk.token_ids.tolist(), topk.logprobs.tolist(), strict=True):
        kept = [
            [token, logprob] for token, logprob in zip(ids, logprobs, strict=True) if logprob > FILLER_LOGPROB
        ]
        yield kept or None


def _null_for_nan(values: Float32Array) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _packed(array: npt.NDArray[Any], dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def _float32s(packed: bytes) -> Float32Array:
    return np.frombuffer(packed, dtype="<f4")


def _int32s(packed: bytes) -> Int64Array:
    return np.frombuffer(packed, dtype="<i4").astype(np.int64)


def _to_json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
