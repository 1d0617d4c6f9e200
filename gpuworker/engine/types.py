"""Values that go into and come out of the engine: frozen, without optional meaning left open.

Axes: N tokens of one datum, K targets per position, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]

LORA_ALPHA = 32.0


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Shape of one adapter. `alpha / rank` scales its product; `seed` fixes its first weights."""

    rank: int
    seed: int
    alpha: float = LORA_ALPHA
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass(frozen=True, kw_only=True)
class Datum:
    """One training example, already shifted by the client.

    Shapes:
        tokens: (N,) input token ids.
        target_tokens: (N,) or (N, K); `target_tokens[t]` follows `tokens[t]`.
        inputs: further float tensors of the loss, each shaped like `target_tokens`
            (`weights`, `logprobs`, `advantages`).
    """

    tokens: Int64Array
    target_tokens: Int64Array
    inputs: Mapping[str, Float32Array]


@dataclass(frozen=True, kw_only=True)
class ForwardBackward:
    """One forward_backward (or forward, when `backward` is false) of one adapter."""

    adapter_id: str
    data: tuple[Datum, ...]
    loss_fn: str
    loss_config: Mapping[str, float] = field(default_factory=dict)
    backward: bool = True


@dataclass(frozen=True, kw_only=True)
class ForwardBackwardResult:
    """Per-datum log-probabilities (float32, shaped like `target_tokens`) and summed metrics.

    `metrics` always holds `loss:sum`, `tokens:sum` (input tokens) and `loss_weight:sum`
    (sum of |weights|, or the number of trained positions where the loss has no weights).
    """

    logprobs: tuple[Float32Array, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class AdamParams:
    """AdamW hyperparameters of one step; `grad_clip_norm` <= 0 turns clipping off."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, kw_only=True)
class OptimStep:
    """One optimizer step of one adapter."""

    adapter_id: str
    params: AdamParams


@dataclass(frozen=True, kw_only=True)
class OptimStepResult:
    """`step` is the 1-based count of applied steps; `grad_norm` is measured before clipping.

    `skipped` is true when the accumulated gradient was not finite: nothing changed but the
    gradient was cleared.
    """

    step: int
    grad_norm: float
    skipped: bool


class StopReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw tokens. `top_k` -1 and `top_p` 1.0 are off; temperature 0 is greedy.

    `stop_tokens` of None means the model's own end tokens; an empty tuple means never.
    `stop_strings` end a sequence once its decoded text holds one of them.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """A prompt to continue `num_samples` times with one set of weights.

    `sampler_id` names weights held by the engine, None means the bare base model.
    """

    request_id: str
    sampler_id: str | None
    prompt: Int64Array
    params: SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0


@dataclass(frozen=True, kw_only=True)
class SampledSequence:
    """Generated tokens with the log-probability of each under the unscaled model."""

    tokens: Int64Array
    logprobs: Float32Array
    stop_reason: StopReason


@dataclass(frozen=True, kw_only=True)
class TopkLogprobs:
    """The k likeliest tokens at each prompt position; row 0 has none (ids 0, logprobs -99999)."""

    token_ids: Int64Array
    logprobs: Float32Array


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """`prompt_logprobs[0]` is NaN; both prompt fields are None unless asked for."""

    request_id: str
    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: Float32Array | None = None
    topk_prompt_logprobs: TopkLogprobs | None = None
