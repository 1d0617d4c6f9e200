"""The few protobuf messages that the stub server reads and writes, by hand and with the standard library only."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of each field of a message; a value is an int or bytes."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield tag >> 3, value
        else:
            size, position = _varint(message, position) if kind == 2 else ({1: 8, 5: 4}[kind], position)
            yield tag >> 3, message[position : position + size]
            position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(index: int, value: int) -> bytes:
    return varint(index << 3) + varint(value)


def blob(index: int, value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return varint(index << 3 | 2) + varint(len(raw)) + raw


def floats(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def read_forward_backward(message: bytes) -> dict[str, Any]:
    """Return a ForwardBackwardRequest in the form of the JSON request."""
    request: dict[str, Any] = {"model_id": "", "seq_id": 0, "forward_only": False}
    body: dict[str, Any] = {"data": [], "loss_fn": "", "loss_fn_config": {}}
    for index, value in fields(message):
        match index:
            case 1:
                request["model_id"] = value.decode()
            case 2:
                request["seq_id"] = value
            case 3:
                body["data"].append(_read_datum(value))
            case 4:
                body["loss_fn"] = value.decode()
            case 5:
                pair = dict(fields(value))
                body["loss_fn_config"][pair[1].decode()] = struct.unpack("<d", pair[2])[0]
            case 6:
                request["forward_only"] = bool(value)
    request["forward_input" if request["forward_only"] else "forward_backward_input"] = body
    return request


def _read_datum(message: bytes) -> dict[str, Any]:
    chunks, inputs = [], {}
    for index, value in fields(message):
        if index == 1:
            raw = dict(fields(dict(fields(value))[1])).get(1, b"")
            chunks.append({"type": "encoded_text", "tokens": list(struct.unpack(f"<{len(raw) // 4}i", raw))})
        elif index == 2:
            pair = dict(fields(value))
            inputs[pair[1].decode()] = _read_tensor(pair[2])
    return {"model_input": {"chunks": chunks}, "loss_fn_inputs": inputs}


def _read_tensor(message: bytes) -> dict[str, Any]:
    tensor = dict(fields(message))
    raw, is_float = tensor.get(1, b""), tensor[3] == 1
    data = struct.unpack(f"<{len(raw) // 4}f" if is_float else f"<{len(raw) // 8}q", raw)
    return {"data": list(data), "dtype": "float32" if is_float else "int64"}


def write_forward_backward_output(output: dict[str, Any]) -> bytes:
    """Return the JSON result of a forward_backward as a ForwardBackwardOutput."""
    rows = [record["logprobs"]["data"] for record in output["loss_fn_outputs"]]
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + 4 * len(row))
    tensor = (
        blob(1, b"".join(map(floats, rows)))
        + blob(2, struct.pack(f"<{len(offsets)}q", *offsets))
        + number(3, 1)
    )
    record = blob(1, "ArrayRecord") + blob(2, blob(1, "logprobs") + blob(2, tensor)) + number(3, len(rows))
    metrics = b"".join(
        blob(3, blob(1, name) + varint(2 << 3 | 1) + struct.pack("<d", value))
        for name, value in output["metrics"].items()
    )
    return blob(1, "ArrayRecord") + blob(2, record) + metrics


def write_sample_response(result: dict[str, Any]) -> bytes:
    """Return the JSON result of a sample as a SampleResponse."""
    out = b""
    for sequence in result["sequences"]:
        tokens = struct.pack(f"<{len(sequence['tokens'])}i", *sequence["tokens"])
        stop_reason = number(1, int(sequence["stop_reason"] == "length"))
        out += blob(1, stop_reason + blob(2, tokens) + blob(3, floats(sequence["logprobs"])))
    if result.get("prompt_logprobs") is not None:
        out += blob(2, floats([float("nan") if x is None else x for x in result["prompt_logprobs"]]))
    if result.get("topk_prompt_logprobs") is not None:
        out += blob(3, _write_topk(result["topk_prompt_logprobs"]))
    return out


def _write_topk(rows: list[list[tuple[int, float]] | None]) -> bytes:
    k = max(len(row or ()) for row in rows)
    flat = [cell for row in rows for cell in (row or [(0, -99999.0)] * k)]
    token_ids = struct.pack(f"<{len(flat)}i", *(token for token, _ in flat))
    return blob(1, token_ids) + blob(2, floats([x for _, x in flat])) + number(3, k) + number(4, len(rows))
