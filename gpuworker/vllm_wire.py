"""What is asked of a vLLM server and what its answers mean, for one request of `SampleRequest` at a time.

Bodies and values only: no connections, no threads. Called by `vllm_sampler`.
Source of the fields: vllm-project/vllm: vllm/entrypoints/openai/completion/protocol.py -> CompletionRequest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from gpuworker.engine.types import (
    Float32Array,
    SampledSequence,
    SampleRequest,
    SampleResult,
    StopReason,
    TopkLogprobs,
)

# Below it vLLM draws at this temperature, or takes the likeliest token.
_LEAST_TEMPERATURE: Final = 0.01
# vLLM writes this in the place of minus infinity.
_LEAST_LOGPROB: Final = -9999.0
_NO_LOGPROB: Final = -99999.0
_LARGEST_SEED: Final = 2**62 - 1
_MAX_REASON_CHARS: Final = 300


class Refusal(Exception):
    """The server does not draw a request, for the given reason; the engine has to."""


def unsuited(request: SampleRequest, *, max_new: int, max_model_len: int) -> str:
    """Return why a server of this context length is not asked at all, or an empty string."""
    params = request.params
    if max_new < 1:
        return "a request for no token at all"
    if len(request.prompt) + max_new > max_model_len:
        return f"more tokens than the server's context of {max_model_len}; see its --max-model-len"
    if 0 < params.temperature < _LEAST_TEMPERATURE:
        return f"a temperature below {_LEAST_TEMPERATURE}, at which vLLM draws as at that"
    return ""


def completion_body(
    request: SampleRequest, *, model: str, max_new: int, end_tokens: Sequence[int], is_streamed: bool
) -> dict[str, Any]:
    """Return the body of POST /v1/completions.

    Everything that a model's own generation config could set otherwise is named. Stop tokens are: the end tokens
    count only where the request wants them. Equal samples, at temperature 0, are asked for once.
    """
    params = request.params
    stop_tokens = end_tokens if params.stop_tokens is None else params.stop_tokens
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt.tolist(),
        "add_special_tokens": False,
        "n": 1 if params.temperature == 0 else request.num_samples,
        "max_tokens": max_new,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k if params.top_k > 0 else -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": params.seed & _LARGEST_SEED,
        "stop": list(params.stop_strings),
        "stop_token_ids": list(stop_tokens),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "logprobs": 0,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "stream": is_streamed,
    }
    if request.prompt_logprobs or request.topk_prompt_logprobs:
        body["prompt_logprobs"] = request.topk_prompt_logprobs
    return body


def can_be_streamed(request: SampleRequest) -> bool:
    """Say whether the tokens can be had while they are drawn: vLLM streams no prompt log-probabilities."""
    return request.num_samples == 1 and not (request.prompt_logprobs or request.topk_prompt_logprobs)


def read_completion(
    content: bytes, request: SampleRequest, *, max_new: int, end_tokens: Sequence[int]
) -> SampleResult:
    """Return what the engine would have answered.

    Raises:
        Refusal: the answer is not a whole one; what it lacks is named.
    """
    try:
        choices = sorted(json.loads(content)["choices"], key=lambda choice: int(choice["index"]))
        sequences = [_sequence(choice, request, max_new, end_tokens) for choice in choices]
        logprobs, topk = _prompt_scores(choices[0].get("prompt_logprobs"), request)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Refusal(f"an answer that cannot be read: {type(error).__name__}: {error}") from error
    if request.params.temperature == 0:
        sequences = sequences[:1] * request.num_samples
    if len(sequences) != request.num_samples:
        raise Refusal(f"an answer with {len(sequences)} samples in the place of {request.num_samples}")
    return SampleResult(
        request_id=request.request_id,
        sequences=tuple(sequences),
        prompt_logprobs=logprobs if request.prompt_logprobs else None,
        topk_prompt_logprobs=topk,
    )


class StreamedCompletion:
    """A single sample that arrives piece by piece; `tokens` grows."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._logprobs: list[float] = []
        self._finish_reason: str | None = None

    def take(self, line: str) -> None:
        """Take one line of the event stream.

        Raises:
            Refusal: it tells an error, or cannot be read.
        """
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        try:
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise Refusal(reason_of(line.removeprefix("data: ").encode()))
            for choice in event["choices"]:
                self.tokens += choice["token_ids"]
                self._logprobs += choice["logprobs"]["token_logprobs"]
                self._finish_reason = choice["finish_reason"]
        except (KeyError, TypeError, ValueError) as error:
            raise Refusal(f"a piece of an answer that cannot be read: {type(error).__name__}") from error

    def result(self, request: SampleRequest, *, max_new: int, end_tokens: Sequence[int]) -> SampleResult:
        """Return the whole; see `read_completion`."""
        choice = {
            "index": 0,
            "token_ids": self.tokens,
            "logprobs": {"token_logprobs": self._logprobs},
            "finish_reason": self._finish_reason,
        }
        content = json.dumps({"choices": [choice]}).encode()
        return read_completion(content, request, max_new=max_new, end_tokens=end_tokens)


def reason_of(content: bytes) -> str:
    """Return the sentence of an error answer."""
    try:
        answer = json.loads(content)
        error = answer.get("error", answer)
        text = str(error["message"] if isinstance(error, dict) and "message" in error else error)
    except (AttributeError, ValueError):
        text = content.decode(errors="replace")
    return " ".join(text.split())[:_MAX_REASON_CHARS]


def _sequence(
    choice: Mapping[str, Any], request: SampleRequest, max_new: int, end_tokens: Sequence[int]
) -> SampledSequence:
    tokens = np.array(choice["token_ids"], dtype=np.int64)
    logprobs = np.array(choice["logprobs"]["token_logprobs"], dtype=np.float32)
    if not 1 <= len(tokens) <= max_new or tokens.shape != logprobs.shape:
        raise ValueError(f"{len(tokens)} tokens with {len(logprobs)} log-probabilities")
    if not (np.isfinite(logprobs).all() and logprobs.min() > _LEAST_LOGPROB):
        raise ValueError("log-probabilities that are not finite")
    params = request.params
    stop_tokens = end_tokens if params.stop_tokens is None else params.stop_tokens
    reason = StopReason.STOP if int(tokens[-1]) in stop_tokens else StopReason(choice["finish_reason"])
    if reason is StopReason.LENGTH and len(tokens) < max_new:
        raise ValueError(f"{len(tokens)} tokens in the place of {max_new}: the server has a limit of its own")
    return SampledSequence(tokens=tokens, logprobs=logprobs, stop_reason=reason)


def _prompt_scores(
    rows: Sequence[Mapping[str, Mapping[str, float]] | None] | None, request: SampleRequest
) -> tuple[Float32Array | None, TopkLogprobs | None]:
    """Return the log-probability of each prompt token, the first NaN, and the likeliest where asked for."""
    if not (request.prompt_logprobs or request.topk_prompt_logprobs):
        return None, None
    num_tokens, top_k = len(request.prompt), request.topk_prompt_logprobs
    if rows is None or len(rows) != num_tokens:
        raise ValueError("no log-probability for each token of the prompt")
    logprobs = np.full(num_tokens, np.nan, dtype=np.float32)
    ids = np.zeros((num_tokens, top_k), dtype=np.int64)
    best = np.full((num_tokens, top_k), _NO_LOGPROB, dtype=np.float32)
    for position in range(1, num_tokens):
        row = rows[position] or {}
        logprobs[position] = row[str(request.prompt[position])]["logprob"]
        # The prompt's own token is there too, also where it is not among the likeliest.
        likeliest = sorted(row.items(), key=lambda item: -item[1]["logprob"])[:top_k]
        ids[position] = [int(token) for token, _ in likeliest]
        best[position] = [score["logprob"] for _, score in likeliest]
    return logprobs, TopkLogprobs(token_ids=ids, logprobs=best) if top_k else None
