"""A small server that speaks the client SDKs' protocol, for testing the client layer without a model.

It counts instead of learning: a token's log-probability grows with every optimizer step that
follows a backward pass. Operations run strictly in `seq_id` order. Standard library only.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.sdk.stub_protobuf import (
    read_forward_backward,
    write_forward_backward_output,
    write_sample_response,
)
from tests.sdk.stub_state import BASE_MODEL, NEVER_HELD, State

POLL_S = 2.0
UNSERVED = ("save_weights_external",)
NOW = "2026-01-02T03:04:05Z"


class Handler(BaseHTTPRequestHandler):
    """One request. Routes by the part of the path behind /api/v1/."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: State

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.dispatch("GET")

    def do_POST(self) -> None:
        self.dispatch("POST")

    def do_PUT(self) -> None:
        self.dispatch("PUT")

    def do_DELETE(self) -> None:
        self.dispatch("DELETE")

    def dispatch(self, method: str) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0].removeprefix("/api/v1/")
        if self.headers.get("Content-Type") == "application/x-protobuf":
            body = read_forward_backward(raw)
        else:
            body = json.loads(raw or b"{}")
        if path == "retrieve_future":
            self.retrieve(body["request_id"])
            return
        with self.state.condition:
            self.state.log.append((path, body | {"api_key": self.headers.get("X-API-Key")}))
            if hasattr(self.state, f"run_{path.replace('/', '_')}"):
                self.reply(self.state.submit(path, body))
            elif path in UNSERVED:
                self.state.skip(body)
                self.reply({"detail": f"{path} is not served here; use save_state"}, 404)
            elif path.startswith("training_runs/"):
                try:
                    self.reply(self.one_run(method, path, body))
                except KeyError:
                    self.reply({"detail": "not found"}, 404)
            else:
                self.reply(self.listing(path) or self.immediate(path, body))

    def immediate(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        state = self.state
        match path.split("/"):
            case ["client", "config"]:
                return {"pjwt_auth_enabled": state.accepts_sk_keys, "use_pyqwest_transport": False}
            case ["auth", "token"]:
                return {"jwt": token()}
            case ["create_session"]:
                state.num_sessions += 1
                return {"type": "create_session", "session_id": f"session-{state.num_sessions}"}
            case ["telemetry"]:
                return {"status": "accepted"}
            case ["get_info"]:
                run = state.runs[body["model_id"]]
                names = {"arch": "tiny", "model_name": run.base_model, "tokenizer_id": state.tokenizer}
                return {
                    "model_id": body["model_id"],
                    "model_data": names,
                    "is_lora": True,
                    "lora_rank": run.rank,
                }
            case ["create_sampling_session"]:
                sampler_id = f"{body['session_id']}:sample:{body['sampling_session_seq_id']}"
                source = state.checkpoints.get(body.get("model_path") or "", {"steps": 0})
                state.samplers[sampler_id] = {"steps": source["steps"]}
                return {"sampling_session_id": sampler_id}
            case ["weights_info"]:
                rank = state.checkpoints[body["tinker_path"]]["rank"]
                return {"base_model": BASE_MODEL, "is_lora": True, "lora_rank": rank}
            case _:
                return {}

    def listing(self, path: str) -> dict[str, Any]:
        state = self.state
        cursor = {"offset": 0, "limit": 100, "total_count": len(state.checkpoints)}
        match path.split("/"):
            case ["get_server_capabilities"]:
                return {"supported_models": [{"model_name": BASE_MODEL, "max_context_length": 2048}]}
            case ["samplers", sampler_id]:
                return {"sampler_id": sampler_id, "base_model": state.tokenizer}
            case ["training_runs"]:
                runs = [self.describe_run(model_id) for model_id in state.runs]
                return {"training_runs": runs, "cursor": cursor | {"total_count": len(runs)}}
            case ["checkpoints"]:
                return {"checkpoints": self.describe_checkpoints(), "cursor": cursor}
            case ["sessions"]:
                return {"sessions": [f"session-{i + 1}" for i in range(state.num_sessions)]}
            case ["sessions", _]:
                return {"training_run_ids": list(state.runs), "sampler_ids": list(state.samplers)}
            case _:
                return {}

    def one_run(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        _, model_id, *rest = path.split("/")
        if not rest:
            return self.describe_run(model_id)
        if rest == ["checkpoints"]:
            return {"checkpoints": self.describe_checkpoints(model_id), "cursor": None}
        tinker_path = f"tinker://{model_id}/{rest[1]}/{rest[2]}"
        checkpoint = self.state.checkpoints[tinker_path]
        match method, rest[3:]:
            case "DELETE", []:
                del self.state.checkpoints[tinker_path]
            case _, ["publish"]:
                checkpoint["public"] = method == "POST"
            case "PUT", ["ttl"]:
                checkpoint["ttl"] = body["ttl_seconds"]
        return None

    def describe_run(self, model_id: str) -> dict[str, Any]:
        run = self.state.runs[model_id]
        described = {"training_run_id": model_id, "base_model": run.base_model, "model_owner": "admin"}
        return described | {"is_lora": True, "lora_rank": run.rank, "last_request_time": NOW}

    def describe_checkpoints(self, model_id: str | None = None) -> list[dict[str, Any]]:
        return [
            {
                "checkpoint_id": checkpoint["id"],
                "checkpoint_type": "training" if checkpoint["id"].startswith("weights/") else "sampler",
                "time": NOW,
                "tinker_path": path,
                "public": checkpoint["public"],
                "expires_at": None if checkpoint["ttl"] is None else NOW,
            }
            for path, checkpoint in self.state.checkpoints.items()
            if model_id in (None, checkpoint["run"])
        ]

    def retrieve(self, request_id: str) -> None:
        state = self.state
        with state.condition:
            state.condition.wait_for(lambda: self.is_ready(request_id), POLL_S)
            ready = self.is_ready(request_id)
            result, kind = state.results.get(request_id, {}), state.kinds[request_id]
        if not ready:
            self.reply({"type": "try_again", "request_id": request_id, "queue_state": "active"}, 408)
        elif "error" in result or "x-protobuf" not in self.headers.get("Accept", ""):
            self.reply(result)
        elif kind == "asample":
            self.send(write_sample_response(result), 200, "application/x-protobuf")
        else:
            self.send(write_forward_backward_output(result), 200, "application/x-protobuf")

    def is_ready(self, request_id: str) -> bool:
        held = self.state.num_submitted < self.state.hold_until
        free = self.state.kinds[request_id] in NEVER_HELD
        return request_id in self.state.results and (free or not held)

    def reply(self, body: dict[str, Any] | None, status: int = 200) -> None:
        if body is None:
            self.send(b"", 204, "application/json")
        else:
            self.send(json.dumps(body).encode(), status, "application/json")

    def send(self, payload: bytes, status: int, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


def token() -> str:
    """Return an unsigned web token, good for an hour."""
    now = int(time.time())
    claims = {"iat": now, "exp": now + 3600, "sub": "admin", "org_id": "org", "email": "admin@localhost"}
    parts: list[dict[str, Any]] = [{"alg": "none"}, claims, {}]
    return ".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts
    )


@contextmanager
def running(
    tokenizer: Path, *, hold_until: int = 0, accepts_sk_keys: bool = True
) -> Iterator[tuple[str, State]]:
    """Serve on a free port and yield (base URL, state).

    Args:
        hold_until: no result of a training or sampling operation is given out before that many
            operations have been submitted.
    """
    state = State(str(tokenizer), accepts_sk_keys, hold_until)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"state": state}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
