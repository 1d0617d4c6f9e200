"""One model shape on one device with the engine and PEFT loaded beside each other, and what turns timings into rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, TypeVar

from bench.batches import Batch
from bench.candidates.engine_runs import EngineRuns
from bench.candidates.peft_runs import PeftRuns
from bench.shapes import RandomModel
from bench.table import Row, ratio_row
from bench.timing import Taken, alternate

RANKS: Final = (16, 8, 32, 16, 8, 16, 32, 4)
"""The ranks of up to eight runs."""
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    num_sequences: int
    num_runs: Sequence[int]
    tokens_a_run: Sequence[int]
    num_samples: Sequence[int]
    num_mixes: int
    rounds: int


class Bench:
    """One shape on one device with both sides loaded; `until` bounds the time of the present measure."""

    def __init__(self, name: str, model: RandomModel, plan: Plan, *, until: float) -> None:
        self.plan, self.until = plan, until
        self.model = model
        self.device = model.device
        self.label = f"{name} {'bf16' if model.dtype == 'bfloat16' else 'fp32'}"
        self.measurement = f"engine, {self.label}"
        self.engine = EngineRuns(model.engine(), RANKS)
        self.peft = PeftRuns(model.plain(), RANKS)

    @property
    def num_parameters(self) -> int:
        """Frozen parameters."""
        return self.engine.engine.num_parameters

    def mixed_lengths(self) -> Batch:
        """Return the batch of one run whose sequences have 32 to 512 tokens."""
        return self.batch(self.plan.num_sequences, 32, 512, skew=1.5)

    def batch(
        self, num_sequences: int, shortest: int, longest: int, *, seed: int = 0, skew: float = 1.0
    ) -> Batch:
        """Return a batch within the model's vocabulary."""
        return Batch(
            num_sequences=num_sequences,
            shortest=shortest,
            longest=longest,
            seed=seed,
            skew=skew,
            vocab_size=self.engine.engine.vocab_size,
        )

    def alternate(
        self,
        candidates: Mapping[str, Callable[[], float]],
        until: float,
        *,
        warm_ups: Mapping[str, int] | None = None,
    ) -> Taken:
        """Time candidates in turn on this bench's device."""
        rounds = self.plan.rounds
        return alternate(candidates, rounds=rounds, device=self.device, until=until, warm_ups=warm_ups)

    def paced(self, items: Sequence[Item]) -> Iterable[tuple[Item, float]]:
        """Yield each item with the time until which it may add rounds: what is left, shared evenly."""
        for number, item in enumerate(items):
            now = time.monotonic()
            yield item, now + (self.until - now) / (len(items) - number)

    def ratio(
        self,
        what: str,
        taken: Taken,
        slow: str,
        fast: str,
        *,
        num_tokens: int,
        at_least: float | None = None,
        note: str = "",
        **facts: float | str,
    ) -> Row:
        """Return how many times faster one candidate is, or why one of them has no figure."""
        failed = [taken.errors[name] for name in (slow, fast) if name in taken.errors]
        if failed:
            return Row(measurement=self.measurement, what=what, measured="failed", note=failed[0])
        seconds = {name: list(taken.seconds[name]) for name in (slow, fast)}
        speeds = f"{num_tokens / median(seconds[fast]):.0f} tokens/s, beside it {num_tokens / median(seconds[slow]):.0f}"
        return ratio_row(
            self.measurement,
            what,
            seconds[slow],
            seconds[fast],
            at_least=at_least if self.device.type == "cpu" else None,
            note=f"{note}; {speeds}" if note else speeds,
            seconds=seconds,
            facts={"tokens": num_tokens, **facts},
        )
