"""A small server that speaks the client SDKs' protocol, for testing the client layer without a model.

It counts instead of learning: a token's log-probability grows with every optimizer step that
follows a backward pass. Operations run strictly in `seq_id` order. Standard library only.
"""

from __future__ import annotations

import base64
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.sdk.stub_protobuf import (
    read_forward_backward,
    write_forward_backward_output,
    write_sample_response,
)

BASE_MODEL = "mintweb/tiny"
GUIDE_MODEL = "Qwen/Qwen3-0.6B"
VOCABULARY = 1000
LOSS_FUNCTIONS = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")
NEVER_HELD = ("create_model", "load_weights")
POLL_S = 2.0
NOW = "2026-01-02T03:04:05Z"


@dataclass
class Run:
    """A training run: what it has learned and which operations wait."""

    base_model: str
    rank: int
    steps: int = 0
    moments: int = 0
    num_backward: int = 0
    next_seq: int = 1
    waiting: dict[int, tuple[str, str, dict[str, Any]]] = field(default_factory=dict)


@dataclass
class State:
    """All that the server knows. Every access holds the condition."""

    tokenizer: str
    accepts_sk_keys: bool
    hold_until: int
    condition: threading.Condition = field(default_factory=threading.Condition)
    runs: dict[str, Run] = field(default_factory=dict)
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    samplers: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    num_sessions: int = 0
    num_submitted: int = 0

    def submit(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take an operation in and run what has become ready."""
        request_id = f"req-{len(self.kinds)}"
        self.kinds[request_id] = path
        self.num_submitted += path not in NEVER_HELD
        run = self.runs.get(body.get("model_id", ""))
        if run is None or body.get("seq_id") is None:
            self.results[request_id] = self._guarded(path, body)
        else:
            run.waiting[body["seq_id"]] = (request_id, path, body)
            while run.next_seq in run.waiting:
                ready_id, ready_path, ready_body = run.waiting.pop(run.next_seq)
                run.next_seq += 1
                self.results[ready_id] = self._guarded(ready_path, ready_body)
        self.condition.notify_all()
        return {"request_id": request_id, "sample_sequence_ids": ["seq"] * body.get("num_samples", 0)}

    def _guarded(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            result: dict[str, Any] = getattr(self, f"run_{path.replace('/', '_')}")(body)
        except (ValueError, KeyError) as error:
            return {"error": str(error), "category": "user"}
        return result

    def run_create_model(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["base_model"] not in (BASE_MODEL, GUIDE_MODEL):
            raise ValueError(f"unknown base model {body['base_model']!r}")
        model_id = f"{body['session_id']}:train:{body['model_seq_id']}"
        self.runs[model_id] = Run(BASE_MODEL, body["lora_config"]["rank"])
        return {"type": "create_model", "model_id": model_id}

    def run_forward(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._forward(self.runs[body["model_id"]], body["forward_input"])

    def run_forward_backward(self, body: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[body["model_id"]]
        if body.get("forward_only"):
            return self._forward(run, body["forward_input"])
        output = self._forward(run, body["forward_backward_input"])
        run.num_backward += 1
        return output

    def _forward(self, run: Run, body: dict[str, Any]) -> dict[str, Any]:
        if body["loss_fn"] not in LOSS_FUNCTIONS:
            raise ValueError(f"unknown loss_fn {body['loss_fn']!r}")
        outputs, loss_sum, weight_sum = [], 0.0, 0.0
        config = body.get("loss_fn_config") or {}
        for datum in body["data"]:
            inputs = {name: tensor["data"] for name, tensor in datum["loss_fn_inputs"].items()}
            logprobs = [logprob(token, run.steps) for token in inputs["target_tokens"]]
            loss_sum += loss_of(body["loss_fn"], logprobs, inputs, config)
            weight_sum += sum(inputs.get("weights", ()))
            outputs.append({"logprobs": {"data": logprobs, "dtype": "float32", "shape": [len(logprobs)]}})
        metrics = {"loss:sum": loss_sum}
        if body["loss_fn"] == "cross_entropy":
            metrics["loss_weight:sum"] = weight_sum
        return {"loss_fn_output_type": "ArrayRecord", "loss_fn_outputs": outputs, "metrics": metrics}

    def run_optim_step(self, body: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[body["model_id"]]
        if run.num_backward:
            run.steps, run.moments, run.num_backward = run.steps + 1, run.moments + 1, 0
        return {"metrics": {"step": float(run.steps)}}

    def run_save_weights(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"type": "save_weights", "path": self._save(body, "weights", body["path"])}

    def run_save_weights_for_sampler(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("path"):
            return {"path": self._save(body, "sampler_weights", body["path"])}
        session = body["model_id"].split(":")[0]
        sampler_id = f"{session}:sample:{body['sampling_session_seq_id']}"
        self.samplers[sampler_id] = {"steps": self.runs[body["model_id"]].steps}
        return {"sampling_session_id": sampler_id}

    def _save(self, body: dict[str, Any], kind: str, name: str) -> str:
        run = self.runs[body["model_id"]]
        path = f"tinker://{body['model_id']}/{kind}/{name}"
        if path in self.checkpoints and not body.get("overwrite"):
            raise ValueError(f"checkpoint {name!r} exists")
        owner = {
            "run": body["model_id"],
            "id": f"{kind}/{name}",
            "public": False,
            "ttl": body.get("ttl_seconds"),
        }
        self.checkpoints[path] = owner
        self.checkpoints[path] |= {"steps": run.steps, "moments": run.moments, "rank": run.rank}
        return path

    def run_load_weights(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["path"] not in self.checkpoints:
            raise ValueError(f"no checkpoint {body['path']!r}")
        checkpoint = self.checkpoints[body["path"]]
        model_id = body.get("model_id") or f"{body['session_id']}:train:{body['model_seq_id']}"
        run = self.runs.setdefault(model_id, Run(BASE_MODEL, checkpoint["rank"]))
        run.steps, run.moments = checkpoint["steps"], checkpoint["moments"] if body["optimizer"] else 0
        return {"type": "load_weights", "path": body["path"], "model_id": model_id}

    def run_asample(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = [token for chunk in body["prompt"]["chunks"] for token in chunk["tokens"]]
        steps = self.samplers[body["sampling_session_id"]]["steps"]
        params = body["sampling_params"]
        start, stop = params.get("seed") or 0, list(params.get("stop") or [])
        for token in prompt:
            logprob(token, steps)
        sequences = []
        for sample in range(body["num_samples"]):
            tokens = [(start + sample + i) % 100 for i in range(params.get("max_tokens") or 8)]
            cut = next((i for i, token in enumerate(tokens) if token in stop), None)
            kept = tokens if cut is None else tokens[: cut + 1]
            reason = "length" if cut is None else "stop"
            logprobs = [logprob(token, steps) for token in kept]
            sequences.append({"stop_reason": reason, "tokens": kept, "logprobs": logprobs})
        result: dict[str, Any] = {"type": "sample", "sequences": sequences}
        scored = [None, *(logprob(token, steps) for token in prompt[1:])]
        if body.get("prompt_logprobs"):
            result["prompt_logprobs"] = scored
        if k := body.get("topk_prompt_logprobs"):
            result["topk_prompt_logprobs"] = [None] + [[(i, -1.0 - i) for i in range(k)] for _ in prompt[1:]]
        return result

    def run_mint_checkpoints_interpolate(self, body: dict[str, Any]) -> dict[str, Any]:
        given = {name: body[name] for name in ("source_paths", "coefficients", "type")}
        path = f"tinker://merged/sampler_weights/{body['output_path']}"
        return {**given, "path": path, "checkpoint_type": "sampler", "has_rank_shards": False}

    def run_mint_forward_backward_reverse_kl(self, body: dict[str, Any]) -> dict[str, Any]:
        losses = [{"loss": {"data": [0.5], "shape": [1], "dtype": "float32"}} for _ in body["data"]]
        return {"type": body["type"], "outputs": losses, "metrics": {"kl": 0.5}}


def logprob(token: int, steps: int) -> float:
    if not 0 <= token < VOCABULARY:
        raise ValueError(f"token {token} is outside the vocabulary of {VOCABULARY}")
    return -2.0 / (1 + steps) - (token % 7) / 10


def loss_of(
    loss_fn: str, logprobs: list[float], inputs: dict[str, list[float]], config: dict[str, float]
) -> float:
    """Return the loss sum of one datum."""
    if loss_fn == "cross_entropy":
        return -sum(p * w for p, w in zip(logprobs, inputs["weights"], strict=True))
    low, high = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    total = 0.0
    for p, q, a in zip(logprobs, inputs["logprobs"], inputs["advantages"], strict=True):
        ratio = math.exp(p - q)
        clipped = min(max(ratio, low), high)
        match loss_fn:
            case "importance_sampling":
                total -= ratio * a
            case "ppo":
                total -= min(ratio * a, clipped * a)
            case "cispo":
                total -= clipped * p * a
            case "dro":
                total -= p * a - config["beta"] / 2 * (p - q) ** 2
    return total


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
