"""The voice of the hash chain engine: what it samples is a hash of the weights, the prompt and the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from gpuworker.engine.types import SampledSequence, SampleRequest, SampleResult, StopReason
from runs.schemas import results
from tests.chaos.client import NUM_SAMPLES, PROMPT, SAMPLE_SEED, SAMPLE_TOKENS


def spoken(weights: bytes, prompt: tuple[int, ...], seed: int, count: int) -> tuple[list[int], list[float]]:
    """Return the tokens that follow a prompt, and their log-probabilities."""
    digest = hashlib.sha256(weights + repr((prompt, seed)).encode()).digest()
    return [digest[index % 32] for index in range(count)], [
        -digest[index % 31] / 64 for index in range(count)
    ]


def answer_of(weights: bytes) -> bytes:
    """Return the wire answer to `client.sample_submission` from these weights."""
    sequences = []
    for index in range(NUM_SAMPLES):
        tokens, logprobs = spoken(weights, PROMPT, SAMPLE_SEED + index, SAMPLE_TOKENS)
        sequences.append(
            results.SampledSequence(
                tokens=np.array(tokens, dtype=np.int64),
                logprobs=np.array(logprobs, dtype=np.float32),
                stop_reason="length",
            )
        )
    return results.encode_sample(results.SampleOutput(sequences=tuple(sequences)))


class Voice:
    """A decode loop that says everything in one step."""

    def __init__(self, samplers: Mapping[str, bytes]) -> None:
        self._samplers = samplers
        self._waiting: dict[str, SampleRequest] = {}

    @property
    def num_pending(self) -> int:
        return len(self._waiting)

    @property
    def num_wanted(self) -> int:
        return sum(request.num_samples for request in self._waiting.values())

    has_left_out = False

    def submit(self, request: SampleRequest) -> None:
        self._waiting[request.request_id] = request

    def cancel(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)

    def step(self) -> list[tuple[str, SampleResult]]:
        said = [(request_id, self._say(request)) for request_id, request in self._waiting.items()]
        self._waiting.clear()
        return said

    def _say(self, request: SampleRequest) -> SampleResult:
        weights = self._samplers[request.sampler_id or ""]
        prompt = tuple(request.prompt.tolist())
        sequences = []
        for index in range(request.num_samples):
            tokens, logprobs = spoken(weights, prompt, request.params.seed + index, request.params.max_tokens)
            sequences.append(
                SampledSequence(
                    tokens=np.array(tokens, dtype=np.int64),
                    logprobs=np.array(logprobs, dtype=np.float32),
                    stop_reason=StopReason.LENGTH,
                )
            )
        return SampleResult(request_id=request.request_id, sequences=tuple(sequences))
