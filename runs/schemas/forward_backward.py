"""forward and forward_backward: JSON and protobuf requests become one payload, stored as one protobuf.

The stored bytes are canonical: two retries of one request give the same bytes, whichever way they
came, so their digest tells a retry from another request under the same seq_id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError
from pydantic import Field

from runs.exceptions import RequestInvalid
from runs.schemas import tinker_pb2 as pb
from runs.schemas.data import (
    UNSUPPORTED_CHUNKS,
    Datum,
    DatumArrays,
    WireModel,
    build_datum,
    check_non_negative,
    check_not_empty,
    check_vocabulary,
    is_read,
)
from runs.schemas.losses import TARGET_TOKENS, LossSpec, check_config, loss_spec
from runs.schemas.names import Id, SeqId
from runs.schemas.parsing import parse_json, validate_object
from runs.schemas.problems import Problems, place_of, show
from runs.schemas.tensors import Int64Array, WireArray, from_proto, int32s

MAX_DATUMS = 65_536
# Dense elements of all target_tokens; a sparse tensor can stand for far more than its bytes.
MAX_ELEMENTS = 16 << 20

DatumT = TypeVar("DatumT")


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardBackwardPayload:
    """One checked forward or forward_backward request; `forward_only` leaves gradients alone."""

    model_id: str
    seq_id: int
    data: tuple[DatumArrays, ...]
    loss_fn: str
    loss_config: Mapping[str, float]
    forward_only: bool

    @property
    def num_tokens(self) -> int:
        """Input tokens of all datums."""
        return sum(datum.tokens.size for datum in self.data)


class _Ids(WireModel):
    model_id: Id
    seq_id: SeqId


class _Input(WireModel):
    data: Annotated[list[Datum], Field(min_length=1, max_length=MAX_DATUMS)]
    loss_fn: str
    loss_fn_config: Annotated[dict[str, Any], Field(max_length=64)] | None = None


def parse_json_request(body: bytes) -> ForwardBackwardPayload:
    """Return the payload of a JSON body of /forward or /forward_backward.

    Raises:
        RequestInvalid: names each place, as `data[3].loss_fn_inputs.weights[7]`.
    """
    value = parse_json(body)
    ids = validate_object(_Ids, value)
    wrapped = value if isinstance(value, dict) else {}
    keys = [key for key in ("forward_backward_input", "forward_input") if wrapped.get(key) is not None]
    if len(keys) != 1:
        raise RequestInvalid("must hold one of forward_backward_input and forward_input")
    given = validate_object(_Input, wrapped[keys[0]])
    loss_config = check_config(given.loss_fn_config or {}, given.loss_fn)
    return ForwardBackwardPayload(
        model_id=ids.model_id,
        seq_id=ids.seq_id,
        data=_read_all(given.data, _read_json_datum, loss_spec(given.loss_fn)),
        loss_fn=given.loss_fn,
        loss_config=loss_config,
        forward_only=keys[0] == "forward_input",
    )


def parse_proto_request(body: bytes) -> ForwardBackwardPayload:
    """Return the payload of a protobuf body of /forward_backward.

    Raises:
        RequestInvalid: not a ForwardBackwardRequest, or its values are wrong, each at its place.
    """
    try:
        request = pb.ForwardBackwardRequest.FromString(body)
    except DecodeError as error:
        raise RequestInvalid("the body is not a whole ForwardBackwardRequest in protobuf") from error
    ids = validate_object(_Ids, {"model_id": request.model_id, "seq_id": request.seq_id})
    if not 1 <= len(request.data) <= MAX_DATUMS:
        raise RequestInvalid(f"must hold 1 to {MAX_DATUMS} datums, got {len(request.data)}", place="data")
    loss_config = check_config(_proto_config(request), request.loss_fn)
    return ForwardBackwardPayload(
        model_id=ids.model_id,
        seq_id=ids.seq_id,
        data=_read_all(request.data, _read_proto_datum, loss_spec(request.loss_fn)),
        loss_fn=request.loss_fn,
        loss_config=loss_config,
        forward_only=request.forward_only,
    )


def check_tokens(payload: ForwardBackwardPayload, *, vocab_size: int, max_context: int) -> None:
    """Check what only the base model knows: its vocabulary and its context length.

    Raises:
        RequestInvalid: a token is outside the vocabulary, or a datum is too long.
    """
    problems = Problems()
    for index, datum in enumerate(payload.data):
        place = f"data[{index}]"
        num_tokens = datum.tokens.size
        if num_tokens > max_context:
            message = f"has {num_tokens} tokens, but the context length of the base model is {max_context}"
            problems.add(message, place=f"{place}.model_input")
        for name, tokens in (
            ("model_input", datum.tokens),
            ("loss_fn_inputs.target_tokens", datum.target_tokens),
        ):
            try:
                check_vocabulary(tokens, vocab_size, place=f"{place}.{name}")
            except RequestInvalid as error:
                problems.add_error(error)
    problems.raise_if_any()


def to_bytes(payload: ForwardBackwardPayload) -> bytes:
    """Return the canonical ForwardBackwardRequest: equal bytes for equal payloads."""
    request = pb.ForwardBackwardRequest(
        model_id=payload.model_id,
        seq_id=payload.seq_id,
        loss_fn=payload.loss_fn,
        loss_fn_config=payload.loss_config,
        forward_only=payload.forward_only,
    )
    for datum in payload.data:
        message = request.data.add()
        message.model_input.add().encoded_text.tokens = datum.tokens.astype("<i4").tobytes()
        inputs = message.loss_fn_inputs
        _put(inputs[TARGET_TOKENS], datum.target_tokens.astype("<i8", copy=False), pb.DType.DTYPE_INT64)
        for name, array in datum.inputs.items():
            _put(inputs[name], array.astype("<f4", copy=False), pb.DType.DTYPE_FLOAT32)
    return request.SerializeToString(deterministic=True)


def from_bytes(stored: bytes) -> ForwardBackwardPayload:
    """Return the payload that `to_bytes` wrote. Trusts it: nothing is checked, arrays are read-only."""
    request = pb.ForwardBackwardRequest.FromString(stored)
    return ForwardBackwardPayload(
        model_id=request.model_id,
        seq_id=request.seq_id,
        data=tuple(map(_stored_datum, request.data)),
        loss_fn=request.loss_fn,
        loss_config=dict(request.loss_fn_config),
        forward_only=request.forward_only,
    )


def _read_all(
    data: Iterable[DatumT], read: Callable[[DatumT, LossSpec, str], DatumArrays], spec: LossSpec
) -> tuple[DatumArrays, ...]:
    problems = Problems()
    datums: list[DatumArrays] = []
    num_elements = 0
    for index, datum in enumerate(data):
        try:
            arrays = read(datum, spec, f"data[{index}]")
        except RequestInvalid as error:
            problems.add_error(error)
            continue
        num_elements += arrays.target_tokens.size
        if num_elements > MAX_ELEMENTS:
            raise RequestInvalid(
                f"more than {MAX_ELEMENTS} target tokens in one request", place=f"data[{index}]"
            )
        datums.append(arrays)
    problems.raise_if_any()
    _check_width(datums)
    return tuple(datums)


def _check_width(datums: Sequence[DatumArrays]) -> None:
    """Refuse data that are far too many when each token has as many targets as that with the most: so they are computed."""
    widths = [1 if datum.target_tokens.ndim == 1 else datum.target_tokens.shape[1] for datum in datums]
    num_tokens = sum(len(datum.tokens) for datum in datums)
    widest = max(widths, default=1)
    if widest > 1 and num_tokens * widest > MAX_ELEMENTS:
        raise RequestInvalid(
            f"has {widest} targets a token, which all {num_tokens} tokens of the request get: "
            f"more than {MAX_ELEMENTS} together; send it by itself",
            place=f"data[{widths.index(widest)}]",
        )


def _read_json_datum(datum: Datum, spec: LossSpec, place: str) -> DatumArrays:
    tokens = datum.model_input.array(place=f"{place}.model_input")
    tensors = {
        name: tensor.array(place=f"{place}.loss_fn_inputs.{name}")
        for name, tensor in datum.loss_fn_inputs.items()
        if is_read(name, spec, place=place)
    }
    return build_datum(tokens, tensors, spec=spec, place=place)


def _read_proto_datum(datum: pb.Datum, spec: LossSpec, place: str) -> DatumArrays:
    tokens = _proto_tokens(datum, f"{place}.model_input")
    tensors = {
        name: from_proto(tensor, place=f"{place}.loss_fn_inputs.{name}")
        for name, tensor in datum.loss_fn_inputs.items()
        if is_read(name, spec, place=place)
    }
    return build_datum(tokens, tensors, spec=spec, place=place)


def _proto_tokens(datum: pb.Datum, place: str) -> Int64Array:
    if not datum.model_input:
        raise RequestInvalid("must hold at least one chunk", place=f"{place}.chunks")
    chunks: list[Int64Array] = []
    for index, chunk in enumerate(datum.model_input):
        kind = chunk.WhichOneof("chunk")
        chunk_place = f"{place}.chunks[{index}]"
        if kind != "encoded_text":
            raise RequestInvalid(
                f"{kind} chunks are not supported: the base model reads text only"
                if kind in UNSUPPORTED_CHUNKS
                else "is not a chunk of text",
                place=chunk_place,
            )
        tokens = int32s(chunk.encoded_text.tokens, place=f"{chunk_place}.tokens")
        check_non_negative(tokens, place=f"{chunk_place}.tokens")
        chunks.append(tokens)
    return check_not_empty(chunks[0] if len(chunks) == 1 else np.concatenate(chunks), place=place)


def _proto_config(request: pb.ForwardBackwardRequest) -> dict[str, object]:
    """Return the config; version 2 wins, since only it can hold text."""
    config: dict[str, object] = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise RequestInvalid(
                f"must be a number, got {show(value.text)}", place=place_of(("loss_fn_config", name))
            )
        config[name] = value.number
    return config


def _put(tensor: pb.Tensor, array: WireArray, dtype: pb.DType) -> None:
    tensor.dense = array.tobytes()
    tensor.dtype = dtype
    tensor.shape.extend(array.shape)


def _stored_datum(datum: pb.Datum) -> DatumArrays:
    tensors = sorted(datum.loss_fn_inputs.items())
    inputs = {name: _stored_array(tensor, "<f4") for name, tensor in tensors if name != TARGET_TOKENS}
    return DatumArrays(
        tokens=np.frombuffer(datum.model_input[0].encoded_text.tokens, dtype="<i4").astype(np.int64),
        target_tokens=_stored_array(datum.loss_fn_inputs[TARGET_TOKENS], "<i8"),
        inputs=inputs,
    )


def _stored_array(tensor: pb.Tensor, dtype: str) -> Any:
    array = np.frombuffer(tensor.dense, dtype=dtype)
    return array if len(tensor.shape) == 1 else array.reshape(tuple(tensor.shape))
