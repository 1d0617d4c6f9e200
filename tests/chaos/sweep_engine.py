"""The hash chain engine with a voice: what it samples is a hash of the weights, the prompt and the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import cast

import numpy as np

from gpuworker.engine.adapters import AdapterState
from gpuworker.engine.engine import Engine
from gpuworker.engine.types import SampledSequence, SampleRequest, SampleResult, StopReason
from runs.models import Worker
from tests.chaos import engine
from tests.chaos.engine import ChainEngine


def load_engines(worker: Worker) -> dict[str, Engine]:
    """Return the speaking chain engine under its model's name."""
    return {name: cast(Engine, SpeakingEngine()) for name in engine.load_engines(worker)}


def spoken(weights: bytes, prompt: tuple[int, ...], seed: int, count: int) -> tuple[list[int], list[float]]:
    """Return the tokens that follow a prompt, and their log-probabilities."""
    digest = hashlib.sha256(weights + repr((prompt, seed)).encode()).digest()
    return [digest[index % 32] for index in range(count)], [
        -digest[index % 31] / 64 for index in range(count)
    ]


class SpeakingEngine(ChainEngine):
    """A chain engine that holds samplers."""

    def __init__(self) -> None:
        super().__init__()
        self._samplers: dict[str, bytes] = {}
        self.sampler: Voice = Voice(self._samplers)  # type: ignore[assignment]

    def keep_sampler(self, sampler_id: str, adapter_id: str) -> None:
        self._samplers[sampler_id] = self._get(adapter_id)[1].weights

    def load_sampler(self, sampler_id: str, state: AdapterState) -> None:
        super().load_sampler(sampler_id, state)
        self._samplers[sampler_id] = bytes(int(value) for value in state.weights.tolist())

    def has_sampler(self, sampler_id: str) -> bool:
        return sampler_id in self._samplers

    def drop_sampler(self, sampler_id: str) -> None:
        self._samplers.pop(sampler_id, None)


class Voice:
    """A decode loop that says everything in one step."""

    def __init__(self, samplers: Mapping[str, bytes]) -> None:
        self._samplers = samplers
        self._waiting: dict[str, SampleRequest] = {}

    @property
    def num_pending(self) -> int:
        return len(self._waiting)

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
