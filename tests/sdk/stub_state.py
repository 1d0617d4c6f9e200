"""What the small server of `stub_server` knows, and what each operation does to it; it counts instead of learning."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any

BASE_MODEL = "mintweb/tiny"
GUIDE_MODEL = "Qwen/Qwen3-0.6B"
VOCABULARY = 1000
LOSS_FUNCTIONS = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")
NEVER_HELD = ("create_model", "load_weights")


@dataclass
class Run:
    """A training run: what it has learned and which operations wait."""

    base_model: str
    rank: int
    steps: int = 0
    moments: int = 0
    num_backward: int = 0
    next_seq: int = 1
    waiting: dict[int, tuple[str, str, dict[str, Any]] | None] = field(default_factory=dict)


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
            self._run_ready(run)
        self.condition.notify_all()
        return {"request_id": request_id, "sample_sequence_ids": ["seq"] * body.get("num_samples", 0)}

    def skip(self, body: dict[str, Any]) -> None:
        """Count an operation that is refused: what follows it does not wait for it."""
        run = self.runs[body["model_id"]]
        run.waiting[body["seq_id"]] = None
        self._run_ready(run)
        self.condition.notify_all()

    def _run_ready(self, run: Run) -> None:
        while run.next_seq in run.waiting:
            ready = run.waiting.pop(run.next_seq)
            run.next_seq += 1
            if ready is not None:
                request_id, path, body = ready
                self.results[request_id] = self._guarded(path, body)

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
