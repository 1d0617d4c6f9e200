"""Valid request bodies, each for a run or session, to be sent as they are or with one thing wrong."""

from __future__ import annotations

from typing import Any

from runs.models import SamplingSession, TrainingRun
from tests.schemas.batches import good_datum
from tests.services import rows

Json = dict[str, Any]


def create_model(session_id: str, model_seq_id: int = 0, **changes: Any) -> Json:
    lora = {"rank": 8, "seed": 1, "train_unembed": True, "train_mlp": True, "train_attn": True}
    return {
        "session_id": session_id,
        "model_seq_id": model_seq_id,
        "base_model": rows.BASE_MODEL,
        "user_metadata": {"team": "a"},
        "lora_config": lora,
        "type": "create_model",
    } | changes


def forward_backward(run: TrainingRun, seq: int, *, data: list[Json] | None = None, **changes: Any) -> Json:
    wrapped = {"data": [good_datum()] if data is None else data, "loss_fn": "cross_entropy"}
    return {"model_id": run.public_id, "seq_id": seq, "forward_backward_input": wrapped | changes}


def forward(run: TrainingRun, seq: int) -> Json:
    body = forward_backward(run, seq)
    return {"forward_input": body.pop("forward_backward_input")} | body


def optim_step(run: TrainingRun, seq: int, **adam: Any) -> Json:
    params = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12} | adam
    return {"model_id": run.public_id, "seq_id": seq, "adam_params": params, "type": "optim_step"}


def save_weights(run: TrainingRun, seq: int, **changes: Any) -> Json:
    return {"model_id": run.public_id, "seq_id": seq, "path": "final", "overwrite": False} | changes


def save_for_sampler(run: TrainingRun, seq: int, **changes: Any) -> Json:
    return {"model_id": run.public_id, "seq_id": seq, "type": "save_weights_for_sampler"} | changes


def load_weights(run: TrainingRun, seq: int, path: str, **changes: Any) -> Json:
    return {"model_id": run.public_id, "seq_id": seq, "path": path, "optimizer": True} | changes


def sample(session: SamplingSession, seq: int = 0, **changes: Any) -> Json:
    return {
        "sampling_session_id": session.public_id,
        "seq_id": seq,
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 5, "temperature": 0.7},
        "prompt_logprobs": False,
        "topk_prompt_logprobs": 0,
        "type": "sample",
    } | changes
