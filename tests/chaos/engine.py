"""The hash chain behind the interface of `gpuworker.engine.engine.Engine`, so that a worker can drive it.

A chain's digests lie in an adapter state as floats from 0 to 255, and so go through the product's own checkpoint files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, cast

import numpy as np
import torch
from django.conf import settings
from torch import Tensor

from gpuworker.engine.adapters import AdapterState, Layout, ModuleShape, OptimizerState, check_fit
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import AdapterNotLoaded, EngineError
from gpuworker.engine.types import (
    Datum,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
    OptimStepResult,
)
from runs.models import Worker
from runs.services import base_models
from runs.services.base_models import BaseModelInfo
from tests.chaos import chain
from tests.chaos.chain import Chain, Example
from tests.chaos.speaking import Voice

MODEL: Final = "chaos/chain"
RANK: Final = 1
_LAYOUT: Final = Layout(RANK, (ModuleShape("chain.q_proj", 16, 16),))
_PASS_S: Final = 0.001


def load_engines(worker: Worker) -> dict[str, Engine]:
    """Return the chain engine under its model's name, in the place of `gpuworker.boot.load_engines`."""
    torch.set_num_threads(1)
    directory = str(settings.BASE_MODELS[MODEL])
    info = BaseModelInfo(
        name=MODEL, directory=directory, vocab_size=256, max_context=256, max_rank=RANK, architecture="Chain"
    )
    base_models.report(worker, info)
    return {MODEL: cast(Engine, ChainEngine())}


class ChainEngine:
    """Many chains, each an adapter of one byte as far as the worker's memory goes: most of a big load are shelved."""

    adapter_room_bytes = 4
    num_slots = 64

    def __init__(self) -> None:
        self._samplers: dict[str, bytes] = {}
        self.sampler = Voice(self._samplers)
        self.max_context = 256
        self.fingerprint: Mapping[str, str] = {"engine": "chain"}
        self._chains: dict[str, tuple[LoraSpec, Chain]] = {}

    def watch(self, on_batch: Callable[[], None]) -> None:
        self._on_batch = on_batch

    def create_adapter(self, adapter_id: str, spec: LoraSpec) -> None:
        self._chains[adapter_id] = (spec, chain.begin(seed=spec.seed, rank=spec.rank))

    def adapter_bytes(self, spec: LoraSpec) -> int:
        return 1

    def has_adapter(self, adapter_id: str) -> bool:
        return adapter_id in self._chains

    def drop_adapter(self, adapter_id: str) -> None:
        self._chains.pop(adapter_id, None)

    def forward_backward(self, jobs: Sequence[ForwardBackward]) -> list[ForwardBackwardResult | EngineError]:
        time.sleep(_PASS_S)
        self._on_batch()
        return [self._forward_backward(job) for job in jobs]

    def optim_step(self, steps: Sequence[OptimStep]) -> list[OptimStepResult | EngineError]:
        return [self._optim_step(step) for step in steps]

    def export_state(self, adapter_id: str, *, optimizer: bool, gradients: bool) -> AdapterState:
        spec, state = self._get(adapter_id)
        moments = OptimizerState(exp_avg=_tensor(state.average), exp_avg_sq=_tensor(state.square))
        has_gradient = gradients and state.gradient is not None
        return AdapterState(
            spec=spec,
            layout=_LAYOUT,
            step=state.step,
            weights=_tensor(state.weights),
            optimizer=moments if optimizer else None,
            gradient=_tensor(state.gradient or b"") if has_gradient else None,
        )

    def import_state(self, adapter_id: str, state: AdapterState, *, optimizer: bool) -> None:
        check_fit(state, _LAYOUT)
        weights = _digest(state.weights)
        held = Chain(weights=weights)
        if optimizer and state.optimizer is not None:
            held = Chain(
                weights=weights,
                average=_digest(state.optimizer.exp_avg),
                square=_digest(state.optimizer.exp_avg_sq),
                gradient=None if state.gradient is None else _digest(state.gradient),
                step=state.step,
            )
        self._chains[adapter_id] = (state.spec, held)

    def keep_sampler(self, sampler_id: str, adapter_id: str) -> None:
        self._samplers[sampler_id] = self._get(adapter_id)[1].weights

    def load_sampler(self, sampler_id: str, state: AdapterState) -> None:
        check_fit(state, _LAYOUT)
        self._samplers[sampler_id] = _digest(state.weights)

    def has_sampler(self, sampler_id: str) -> bool:
        return sampler_id in self._samplers

    def use_sampler(self, sampler_id: str) -> bool:
        return self.has_sampler(sampler_id)

    def drop_sampler(self, sampler_id: str) -> None:
        self._samplers.pop(sampler_id, None)

    def _get(self, adapter_id: str) -> tuple[LoraSpec, Chain]:
        if adapter_id not in self._chains:
            raise AdapterNotLoaded(f"adapter {adapter_id} is not loaded")
        return self._chains[adapter_id]

    def _forward_backward(self, job: ForwardBackward) -> ForwardBackwardResult | EngineError:
        try:
            spec, before = self._get(job.adapter_id)
        except AdapterNotLoaded as error:
            return error
        examples = [_example(datum) for datum in job.data]
        after, answer = chain.forward(before, examples, backward=job.backward)
        self._chains[job.adapter_id] = (spec, after)
        return ForwardBackwardResult(
            logprobs=tuple(
                np.array(chain.logprobs(answer, len(one.targets)), dtype=np.float32) for one in examples
            ),
            metrics=chain.metrics(answer, examples),
        )

    def _optim_step(self, step: OptimStep) -> OptimStepResult | EngineError:
        try:
            spec, before = self._get(step.adapter_id)
        except AdapterNotLoaded as error:
            return error
        after, norm = chain.optim_step(before, step.params.learning_rate)
        self._chains[step.adapter_id] = (spec, after)
        return OptimStepResult(step=after.step, grad_norm=norm, skipped=False)


def _example(datum: Datum) -> Example:
    return Example(
        tokens=tuple(datum.tokens.tolist()),
        targets=tuple(datum.target_tokens.tolist()),
        weights=tuple(datum.inputs["weights"].tolist()),
    )


def _tensor(digest: bytes) -> Tensor:
    return torch.tensor(list(digest), dtype=torch.float32)


def _digest(tensor: Tensor) -> bytes:
    return bytes(int(value) for value in tensor.tolist())
