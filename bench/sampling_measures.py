"""Sampling: many adapters together beside `generate`, and samples of one prompt beside as many requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from bench.loaded import Bench
from bench.table import Row

_NUM_NEW: Final = 32
_NUM_RUNS: Final = 4
_SHARED_PROMPT: Final = 0


def sampling(bench: Bench) -> Iterator[Row]:
    """Put greedy sampling with mixed adapters beside `generate`, and samples of one prompt beside requests."""
    for count, until in bench.paced([*bench.plan.num_samples, _SHARED_PROMPT]):
        if count == _SHARED_PROMPT:
            yield _shared_prompt(bench, until)
        else:
            yield from _generation(bench, count, until)


def _generation(bench: Bench, count: int, until: float) -> list[Row]:
    num_runs = min(_NUM_RUNS, count)
    prompts = [one[:-1] for one in bench.batch(count, 24, 64).sequences()]
    owners = [number % num_runs for number in range(count)]
    by_run = [
        [p for p, owner in zip(prompts, owners, strict=True) if owner == run] for run in range(num_runs)
    ]

    def per_adapter() -> float:
        for run, own in enumerate(by_run):
            bench.peft.generate(run, own, _NUM_NEW)
        return 0.0

    def one_adapter() -> float:
        bench.peft.generate(0, prompts, _NUM_NEW)
        return 0.0

    mixed = list(zip(owners, prompts, strict=True))
    candidates: dict[str, Callable[[], float]] = {
        "engine": lambda: bench.engine.sample(mixed, _NUM_NEW),
        "generate": one_adapter,
    }
    if num_runs > 1:
        candidates["per_adapter"] = per_adapter
    taken = bench.alternate(candidates, until, warm_ups=1)
    name = f"sampling {count} {'sequence' if count == 1 else 'sequences'} with {num_runs} adapters together"
    if num_runs == 1:
        name = "sampling 1 sequence"
    num_tokens = count * _NUM_NEW
    rows = []
    if num_runs > 1:
        target = 3.0 if (bench.label, count) == ("S fp32", 8) else None
        rows.append(
            bench.ratio(
                f"{name}, against generate for each adapter",
                taken,
                "per_adapter",
                "engine",
                num_tokens=num_tokens,
                at_least=target,
                sequences=count,
            )
        )
    against = "generate" if num_runs == 1 else "generate with one adapter for all"
    rows.append(
        bench.ratio(
            f"{name}, against {against}",
            taken,
            "generate",
            "engine",
            num_tokens=num_tokens,
            sequences=count,
        )
    )
    return rows


def _shared_prompt(bench: Bench, until: float) -> Row:
    length = 256 if bench.device.type == "cpu" else 1024
    prompt = bench.batch(1, length, length).sequences()[0][:-1]
    taken = bench.alternate(
        {
            "requests": lambda: bench.engine.sample([(0, prompt)] * 16, 16, temperature=1.0),
            "samples": lambda: bench.engine.sample([(0, prompt)], 16, num_samples=16, temperature=1.0),
        },
        until,
    )
    return bench.ratio(
        f"16 samples of a prompt of {length} tokens, against 16 requests",
        taken,
        "requests",
        "samples",
        num_tokens=16 * 16,
    )
