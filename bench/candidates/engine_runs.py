"""The same runs in mintweb's engine, in this process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from gpuworker.engine.engine import Engine
from gpuworker.engine.types import (
    AdamParams,
    Datum,
    ForwardBackward,
    LoraSpec,
    OptimStep,
    SampleRequest,
    SamplingParams,
)


class EngineRuns:
    """An adapter for each run, and a sampler of its first weights."""

    def __init__(self, engine: Engine, ranks: Sequence[int]) -> None:
        self.engine = engine
        self._names = [f"run{i}" for i in range(len(ranks))]
        self._numbers = itertools.count()
        for name, rank in zip(self._names, ranks, strict=True):
            engine.create_adapter(name, LoraSpec(rank=rank, seed=1))
            engine.keep_sampler(name, name)

    def step(self, data: Sequence[tuple[Datum, ...]]) -> float:
        """Take one training step of each of the first runs, packed; return the summed loss."""
        loss = self._forward_backward(data, backward=True)
        params = AdamParams(learning_rate=1e-4)
        steps = [OptimStep(adapter_id=name, params=params) for name in self._names[: len(data)]]
        for outcome in self.engine.optim_step(steps):
            if isinstance(outcome, Exception):
                raise outcome
        return loss

    def loss(self, data: Sequence[tuple[Datum, ...]]) -> float:
        """Return the summed loss of the first runs."""
        return self._forward_backward(data, backward=False)

    def _forward_backward(self, data: Sequence[tuple[Datum, ...]], *, backward: bool) -> float:
        jobs = [
            ForwardBackward(adapter_id=name, data=own, loss_fn="cross_entropy", backward=backward)
            for name, own in zip(self._names, data, strict=False)
        ]
        loss = 0.0
        for outcome in self.engine.forward_backward(jobs):
            if isinstance(outcome, Exception):
                raise outcome
            loss += outcome.metrics["loss:sum"]
        return loss

    def sample(
        self,
        prompts: Sequence[tuple[int, list[int]]],
        num_tokens: int,
        *,
        num_samples: int = 1,
        temperature: float = 0.0,
    ) -> int:
        """Continue prompts, each with its run's adapter, and return how many tokens came out."""
        params = SamplingParams(max_tokens=num_tokens, seed=0, temperature=temperature, stop_tokens=())
        for run, prompt in prompts:
            request = SampleRequest(
                request_id=f"request{next(self._numbers)}",
                sampler_id=self._names[run],
                prompt=np.array(prompt),
                params=params,
                num_samples=num_samples,
            )
            self.engine.sampler.submit(request)
        count = 0
        while self.engine.sampler.num_pending:
            for _, outcome in self.engine.sampler.step():
                if isinstance(outcome, Exception):
                    raise outcome
                count += sum(len(sequence.tokens) for sequence in outcome.sequences)
        return count
