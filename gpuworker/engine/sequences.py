"""The book-keeping of sampling: one request in progress and each of its continuations.

No tensors of the model here; `sampling` moves these through the model.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np

from gpuworker.engine.adapters import LoraWeights
from gpuworker.engine.exceptions import SamplingError
from gpuworker.engine.prompt_scores import PromptScores
from gpuworker.engine.stop_strings import TextDecoder
from gpuworker.engine.types import Int64Array, SampledSequence, SampleRequest, SampleResult, StopReason


class ActiveRequest:
    """A request with its weights, the samples finished so far and those not yet begun.

    The prompt and its continuation together never exceed the model's context: `max_new` is
    clamped, so a prompt that fills the context gets empty continuations.

    Args:
        order: a number that its weights have to themselves.
    """

    def __init__(
        self,
        request: SampleRequest,
        weights: LoraWeights | None,
        *,
        order: int,
        end_tokens: tuple[int, ...],
        max_context: int,
    ) -> None:
        params = request.params
        self.request = request
        self.weights = weights
        self.order = order
        stop_tokens = end_tokens if params.stop_tokens is None else params.stop_tokens
        self.stop_tokens = frozenset(stop_tokens)
        self.max_new = min(params.max_tokens, max_context - len(request.prompt))
        self.num_begun = 0
        self.was_left_out = False  # of a step, for want of a slot
        self.prompt_scores: PromptScores | None = None
        self._finished: dict[int, SampledSequence] = {}

    @property
    def num_positions(self) -> int:
        """Return the most positions that one sample takes."""
        return len(self.request.prompt) + self.max_new

    @property
    def num_unbegun(self) -> int:
        """Return how many samples still wait for a slot."""
        return self.request.num_samples - self.num_begun

    @property
    def wants_prompt_scores(self) -> bool:
        """Return whether prompt log-probabilities are wanted and not there yet."""
        request = self.request
        return self.prompt_scores is None and (request.prompt_logprobs or request.topk_prompt_logprobs > 0)

    @property
    def is_done(self) -> bool:
        """Return whether every sample has ended."""
        return len(self._finished) == self.request.num_samples

    def finish(self, continuation: Continuation, reason: StopReason) -> None:
        """Keep one ended continuation."""
        self._finished[continuation.sample] = SampledSequence(
            tokens=np.array(continuation.tokens, dtype=np.int64),
            logprobs=np.array(continuation.logprobs, dtype=np.float32),
            stop_reason=reason,
        )

    def result(self) -> SampleResult:
        """Return the whole result; only once done."""
        scores = self.prompt_scores
        return SampleResult(
            request_id=self.request.request_id,
            sequences=tuple(self._finished[i] for i in range(self.request.num_samples)),
            prompt_logprobs=scores.logprobs if scores and self.request.prompt_logprobs else None,
            topk_prompt_logprobs=scores.topk if scores else None,
        )


class Continuation:
    """One sample of a request in its slot; `num_cached` positions of it are in the cache."""

    def __init__(self, active: ActiveRequest, *, sample: int, slot: int) -> None:
        self.active = active
        self.sample = sample
        self.slot = slot
        self.num_cached = 0
        self.tokens: list[int] = []
        self.logprobs: list[float] = []

    def append(self, token: int, logprob: float, decoder: TextDecoder) -> StopReason | None:
        """Take one chosen token; return why the continuation ends with it, None if it goes on.

        A stop token, and the token that completes a stop string, are part of the output.
        """
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.active.stop_tokens:
            return StopReason.STOP
        if decoder.ends_with_stop(self.tokens, self.active.request.params.stop_strings):
            return StopReason.STOP
        return StopReason.LENGTH if len(self.tokens) >= self.active.max_new else None


def check_request(request: SampleRequest, *, vocab_size: int, max_context: int) -> None:
    """Check everything about a request that needs no weights.

    Raises:
        SamplingError: names the value that cannot be served.
    """
    prompt, params = request.prompt, request.params
    if prompt.ndim != 1 or not 1 <= len(prompt) <= max_context:
        raise SamplingError(f"a prompt of shape {prompt.shape}: 1 to {max_context} tokens fit the context")
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise SamplingError(f"the prompt holds token ids outside the vocabulary 0..{vocab_size - 1}")
    if request.num_samples < 1:
        raise SamplingError(f"num_samples is {request.num_samples}; at least 1 is needed")
    if params.max_tokens < 0:
        raise SamplingError(f"max_tokens is {params.max_tokens}; it cannot be negative")
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise SamplingError(f"temperature is {params.temperature}; it must be 0 or a positive number")
    if params.top_k < -1:
        raise SamplingError(f"top_k is {params.top_k}; it must be positive, or -1 or 0 for off")
    if not 0 < params.top_p <= 1:
        raise SamplingError(f"top_p is {params.top_p}; it must be above 0 and at most 1")
    if not 0 <= request.topk_prompt_logprobs <= vocab_size:
        raise SamplingError(
            f"topk_prompt_logprobs is {request.topk_prompt_logprobs}; it must be in 0..{vocab_size}"
        )


Group: TypeAlias = list[Continuation]
"""Continuations that share one row of logits: new samples of one prompt, or a single running one."""


def new_tokens(group: Group) -> Int64Array:
    """Return what a group puts through the model: its whole prompt at first, then its last token."""
    leader = group[0]
    return np.array(leader.tokens[-1:], dtype=np.int64) if leader.tokens else leader.active.request.prompt


def num_new_tokens(group: Group) -> int:
    """Return how many tokens those are."""
    return 1 if group[0].tokens else len(group[0].active.request.prompt)
