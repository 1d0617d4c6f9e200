"""A light client with the rules of the published SDK: what it sends again, what it waits for, what is fatal.

Only its first pause is shorter than the SDK's, so that a second of downtime costs a second of load.
"""

from __future__ import annotations

import http.client
import json
import random
import struct
import time
from collections.abc import Callable
from typing import Any, Final

from runs.schemas import tinker_pb2 as pb
from tests.chaos.scripts import Op

SUBMIT_PATIENCE_S: Final = 300.0
POLL_TIMEOUT_S: Final = 45.0
PROMPT: Final = (3, 1, 4)
SAMPLE_SEED: Final = 11
SAMPLE_TOKENS: Final = 5
NUM_SAMPLES: Final = 2
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_TRANSIENT: Final = (408, 409, 429)


class ClientError(Exception):
    """What an SDK would raise to its user."""


class Client:
    """One keep-alive connection; not to be shared between threads."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._key = key
        self._connection: http.client.HTTPConnection | None = None
        self.num_instant_errors = 0

    def call(self, path: str, body: Any) -> dict[str, Any]:
        """Send a request until it is taken, as the SDK does for five minutes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/x-protobuf" if isinstance(body, bytes) else "application/json"
        until = time.monotonic() + SUBMIT_PATIENCE_S
        pause = _pauses()
        while True:
            status, answer = self._send(path, content, kind)
            if status == 200:
                taken: dict[str, Any] = json.loads(answer)
                return taken
            if status and status not in _TRANSIENT and status < 500:
                raise ClientError(f"{path}: {status} {answer[:300]!r}")
            if time.monotonic() > until:
                raise ClientError(f"{path}: not taken within {SUBMIT_PATIENCE_S} s, at last {status}")
            pause()

    def result(self, request_id: str) -> bytes:
        """Return an operation's answer as sent; polls for as long as it takes."""
        body = json.dumps({"request_id": request_id, "allow_metadata_only": True}).encode()
        num_bad = 0
        pause = _pauses()
        while True:
            started_at = time.monotonic()
            status, answer = self._send("retrieve_future", body, "application/json")
            if status == 200:
                return answer
            if status == 400:
                num_bad += 1
            if status in (401, 403, 404, 410, 422) or num_bad > 2:
                raise ClientError(f"{request_id}: {status} {answer[:300]!r}")
            if status == 408 or status >= 500:
                self.num_instant_errors += time.monotonic() - started_at < 0.5
            else:
                pause()

    def _send(self, path: str, body: bytes, kind: str) -> tuple[int, bytes]:
        """Return status and body; status 0 when there was no whole answer."""
        headers = {
            "x-api-key": self._key,
            "content-type": kind,
            "accept": "application/x-protobuf, application/json",
            "x-stainless-read-timeout": str(POLL_TIMEOUT_S),
        }
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=POLL_TIMEOUT_S)
        try:
            self._connection.request("POST", f"/api/v1/{path}", body, headers)
            response = self._connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            self._connection = None
            return 0, b""


def submission(op: Op, model_id: str, seq: int) -> tuple[str, Any]:
    """Return path and body of an operation."""
    ids = {"model_id": model_id, "seq_id": seq}
    if op.kind in ("forward", "forward_backward"):
        return "forward_backward", _proto(op, model_id, seq)
    if op.kind == "optim_step":
        return op.kind, {**ids, "adam_params": {"learning_rate": op.learning_rate}, "type": "optim_step"}
    if op.kind == "save":
        return "save_weights", {**ids, "path": op.name}
    if op.kind == "save_for_sampler":
        return "save_weights_for_sampler", {**ids, "path": op.name}
    if op.kind == "save_for_session":
        return "save_weights_for_sampler", {**ids, "sampling_session_seq_id": int(op.name)}
    path = f"tinker://{model_id}/weights/{op.name}"
    return "load_weights", {**ids, "path": path, "optimizer": op.optimizer}


def sample_submission(sampling_session: str, seq: int = 1) -> dict[str, Any]:
    """Return the body of a request for samples, which a seed fixes."""
    return {
        "sampling_session_id": sampling_session,
        "seq_id": seq,
        "num_samples": NUM_SAMPLES,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(PROMPT)}]},
        "sampling_params": {"max_tokens": SAMPLE_TOKENS, "seed": SAMPLE_SEED},
    }


def _proto(op: Op, model_id: str, seq: int) -> bytes:
    request = pb.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq, loss_fn="cross_entropy", forward_only=op.kind == "forward"
    )
    for example in op.examples:
        datum = request.data.add()
        datum.model_input.add().encoded_text.tokens = _packed(example.tokens, "i")
        targets, weights = datum.loss_fn_inputs["target_tokens"], datum.loss_fn_inputs["weights"]
        targets.dense, targets.dtype = _packed(example.targets, "q"), pb.DType.DTYPE_INT64
        weights.dense, weights.dtype = _packed(example.weights, "f"), pb.DType.DTYPE_FLOAT32
        targets.shape.append(len(example.targets))
        weights.shape.append(len(example.weights))
    return request.SerializeToString(deterministic=True)


def _packed(values: tuple[int, ...] | tuple[float, ...], code: str) -> bytes:
    return struct.pack(f"<{len(values)}{code}", *values)


def _pauses() -> Callable[[], None]:
    """Return a function that sleeps longer each time."""
    length = _FIRST_PAUSE_S

    def pause() -> None:
        nonlocal length
        time.sleep(length * random.uniform(0.75, 1.25))
        length = min(length * 2, _LONGEST_PAUSE_S)

    return pause
