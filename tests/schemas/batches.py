"""Builds forward_backward bodies in JSON and in protobuf from one description."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from runs.schemas import tinker_pb2 as pb
from runs.schemas.forward_backward import ForwardBackwardPayload, parse_json_request, parse_proto_request

DTYPES = {
    "float32": (pb.DType.DTYPE_FLOAT32, "<f4"),
    "int64": (pb.DType.DTYPE_INT64, "<i8"),
    "int32": (pb.DType.DTYPE_INT32, "<i4"),
    "unknown": (99, "<i4"),
}


def tensor(data: list[Any], dtype: str = "float32", **rest: Any) -> dict[str, Any]:
    return {"data": data, "dtype": dtype, **rest}


def datum(tokens: list[int], **tensors: Any) -> dict[str, Any]:
    chunks = [{"type": "encoded_text", "tokens": tokens}]
    return {"model_input": {"chunks": chunks}, "loss_fn_inputs": tensors}


def good_datum(num_tokens: int = 3) -> dict[str, Any]:
    tokens = list(range(1, num_tokens + 1))
    return datum(tokens, target_tokens=tensor(tokens, "int64"), weights=tensor([1.0] * num_tokens))


def rl_datum(**changes: Any) -> dict[str, Any]:
    tensors = {
        "target_tokens": tensor([2, 3], "int64"),
        "logprobs": tensor([-1.0, -2.0]),
        "advantages": tensor([0.5, -0.5]),
    }
    return datum([1, 2], **(tensors | changes))


def two_dimensional(**changes: Any) -> dict[str, Any]:
    tensors = {
        "target_tokens": tensor([5, 6, 7, 8], "int64", shape=[2, 2]),
        "weights": tensor([0.5, 0.5, 1.0, 0.0], shape=[2, 2]),
    }
    return datum([1, 2], **(tensors | changes))


def sparse(values: list[Any], dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    rest: dict[str, Any] = {"shape": [2, 2], "sparse_crow_indices": [0, 1, 2], "sparse_col_indices": [1, 0]}
    return tensor(values, dtype, **(rest | changes))


def json_body(data: Any, loss_fn: object = "cross_entropy", *, config: Any = None, **top: Any) -> bytes:
    wrapped = {"data": data, "loss_fn": loss_fn, "loss_fn_config": config}
    return json.dumps({"model_id": "m", "seq_id": 1, "forward_backward_input": wrapped} | top).encode()


def proto_body(data: Any, loss_fn: str = "cross_entropy", *, config: Any = None, **top: Any) -> bytes:
    fields: dict[str, Any] = {"model_id": "m", "seq_id": 1} | top
    request = pb.ForwardBackwardRequest(loss_fn=loss_fn, **fields)
    for name, value in (config or {}).items():
        kind = "text" if isinstance(value, str) else "number"
        request.loss_fn_config_v2[name].CopyFrom(pb.LossConfigValue(**{kind: value}))
    for item in data:
        message = request.data.add()
        for chunk in item["model_input"]["chunks"]:
            _add_chunk(message, chunk)
        for name, value in item["loss_fn_inputs"].items():
            _put(message.loss_fn_inputs[name], value)
    return request.SerializeToString()


def _add_chunk(message: pb.Datum, chunk: dict[str, Any]) -> None:
    kind = chunk["type"]
    if kind == "encoded_text":
        message.model_input.add().encoded_text.tokens = np.array(chunk["tokens"], "<i4").tobytes()
    elif kind == "image":
        message.model_input.add().image.format = "png"
    else:
        message.model_input.add().dmel.dmel = b"x"


def _put(message: pb.Tensor, value: dict[str, Any]) -> None:
    dtype, numpy_dtype = DTYPES[value["dtype"]]
    values = np.array(value["data"], numpy_dtype).tobytes()
    if "sparse_crow_indices" in value:
        crow, col = (np.array(value[f"sparse_{axis}_indices"], "<i8").tobytes() for axis in ("crow", "col"))
        message.sparse_csr.CopyFrom(pb.SparseCsr(values=values, crow_indices=crow, col_indices=col))
    else:
        message.dense = values
    message.dtype = dtype  # type: ignore[assignment]
    message.shape.extend(value.get("shape") or [])


def parse_from_json(data: Any, loss_fn: str = "cross_entropy", **rest: Any) -> ForwardBackwardPayload:
    return parse_json_request(json_body(data, loss_fn, **rest))


def parse_from_proto(data: Any, loss_fn: str = "cross_entropy", **rest: Any) -> ForwardBackwardPayload:
    return parse_proto_request(proto_body(data, loss_fn, **rest))


PARSERS: dict[str, Callable[..., ForwardBackwardPayload]] = {
    "json": parse_from_json,
    "proto": parse_from_proto,
}

both_wires = pytest.mark.parametrize("parse", PARSERS.values(), ids=PARSERS)
