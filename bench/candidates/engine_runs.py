"""The same runs in mintweb's engine, in this process."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

from gpuworker.engine.adapters import Adapter
from gpuworker.engine.engine import Engine
from gpuworker.engine.lora import RoutedLinear
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
        self._pending: set[str] = set()
        for name, rank in zip(self._names, ranks, strict=True):
            engine.create_adapter(name, LoraSpec(rank=rank, seed=1))
            engine.keep_sampler(name, name)

    def step(self, data: Sequence[tuple[Datum, ...]]) -> float:
        """Take one training step of each of the first runs, packed; return the summed loss."""
        loss = self._forward_backward(data, backward=True)
        self._optim_step(self._names[: len(data)])
        return loss

    def optim_step(self) -> None:
        """Apply the gradients of all runs."""
        self._optim_step(self._names)

    def adapters(self) -> list[Adapter]:
        """Return the adapters of all runs."""
        return [self.engine._adapters.get(name) for name in self._names]

    def routed_layers(self) -> list[RoutedLinear]:
        """Return the projections that adapters are routed through."""
        return [one for one in self.engine._base._decoder.modules() if isinstance(one, RoutedLinear)]

    def forget_recorded(self) -> None:
        """Let go of recorded passes and their memory, on a device where there are such."""
        if self.engine._trainer._graphs is not None:
            self.engine._trainer._graphs.release()

    def loss(self, data: Sequence[tuple[Datum, ...]]) -> float:
        """Return the summed loss of the first runs."""
        return self._forward_backward(data, backward=False)

    def gradient(self, data: Sequence[tuple[Datum, ...]]) -> None:
        """Add to the gradients of the first runs, packed."""
        self._forward_backward(data, backward=True)

    def digests(self, runs: Sequence[int], data: Sequence[tuple[Datum, ...]]) -> list[str]:
        """Return a digest of each run's log-probabilities and gradient, computed packed in this order.

        The gradients are gone afterwards, the weights are as they were.
        """
        names = [self._names[run] for run in runs]
        jobs = [
            ForwardBackward(adapter_id=name, data=data[run], loss_fn="cross_entropy")
            for name, run in zip(names, runs, strict=True)
        ]
        digests = []
        for name, outcome in zip(names, self.engine.forward_backward(jobs), strict=True):
            if isinstance(outcome, Exception):
                raise outcome
            gradient_P = self.engine.export_state(name, optimizer=False, gradients=True).gradient
            assert gradient_P is not None, f"{name} has no gradient"
            digest = hashlib.sha256(gradient_P.numpy().tobytes())
            for logprobs in outcome.logprobs:
                digest.update(logprobs.tobytes())
            digests.append(digest.hexdigest())
        self._optim_step(names, learning_rate=0.0)
        return digests

    def _optim_step(self, names: Sequence[str], *, learning_rate: float = 1e-4) -> None:
        params = AdamParams(learning_rate=learning_rate)
        for outcome in self.engine.optim_step([OptimStep(adapter_id=name, params=params) for name in names]):
            if isinstance(outcome, Exception):
                raise outcome

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
        self.begin(prompts, num_tokens, num_samples=num_samples, temperature=temperature)
        count = 0
        while self.engine.sampler.num_pending:
            count += self.decode()
        return count

    def begin(
        self,
        prompts: Sequence[tuple[int, list[int]]],
        num_tokens: int,
        *,
        num_samples: int = 1,
        temperature: float = 0.0,
    ) -> None:
        """Submit prompts, each with its run's adapter; `decode` draws their tokens."""
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
            self._pending.add(request.request_id)

    def decode(self) -> int:
        """Draw a token of every sequence; return how many tokens the requests that ended got."""
        count = 0
        for request_id, outcome in self.engine.sampler.step():
            self._pending.remove(request_id)
            if isinstance(outcome, Exception):
                raise outcome
            count += sum(len(sequence.tokens) for sequence in outcome.sequences)
        return count

    def renew(self, run: int, prompt: list[int]) -> None:
        """Apply a run's gradient and draw one token of a prompt with the new weights, beside what is being decoded."""
        self._optim_step([self._names[run]])
        self.engine.keep_sampler(self._names[run], self._names[run])
        self.begin([(run, prompt)], 1)
        while self.decode() == 0:
            pass

    def cancel(self) -> None:
        """Forget all that is being decoded."""
        for request_id in self._pending:
            self.engine.sampler.cancel(request_id)
        self._pending.clear()
