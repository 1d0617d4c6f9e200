"""Sampling: many adapters together beside `generate`, and samples of one prompt beside as many requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from bench.loaded import Bench
from bench.table import Row

_NUM_NEW: Final = 32
_NUM_RUNS: Final = 4
_NUM_SAMPLES: Final = 16
_SHARED_PROMPT: Final = 0
_TARGETS: Final = {("S fp32", 8): (4.0, 1.3)}
"""Against generate for each adapter and for all with one, by model and number of sequences."""
_SHARING_TARGET: Final = 2.0


def sampling(bench: Bench) -> Iterator[Row]:
    """Put greedy sampling with mixed adapters beside `generate`, and samples of one prompt beside requests."""
    for count, until in bench.paced([*bench.plan.num_samples, _SHARED_PROMPT]):
        if count == _SHARED_PROMPT:
            yield from _shared_prompt(bench, until)
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
    taken = bench.alternate(candidates, until, warm_ups=dict.fromkeys(candidates, 1))
    name = f"sampling {count} {'sequence' if count == 1 else 'sequences'} with {num_runs} adapters together"
    if num_runs == 1:
        name = "sampling 1 sequence"
    num_tokens = count * _NUM_NEW
    rows = []
    against_each, against_one = _TARGETS.get((bench.label, count), (None, None))
    if num_runs > 1:
        rows.append(
            bench.ratio(
                f"{name}, against generate for each adapter",
                taken,
                "per_adapter",
                "engine",
                num_tokens=num_tokens,
                at_least=against_each,
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
            at_least=against_one,
            sequences=count,
        )
    )
    return rows


def _shared_prompt(bench: Bench, until: float) -> list[Row]:
    """Put samples of one prompt beside requests that have nothing in common, and beside requests with that prompt."""
    length = 256 if bench.device.type == "cpu" else 1024
    prompts = [one[:-1] for one in bench.batch(_NUM_SAMPLES, length, length).sequences()]
    prompt, num_new = prompts[0], 16

    def requests(wanted: list[list[int]], num_samples: int = 1) -> float:
        own = [(0, one) for one in wanted]
        return bench.engine.sample(own, num_new, num_samples=num_samples, temperature=1.0)

    taken = bench.alternate(
        {
            "prompts": lambda: requests(prompts),
            "requests": lambda: requests([prompt] * _NUM_SAMPLES),
            "samples": lambda: requests([prompt], _NUM_SAMPLES),
        },
        until,
    )
    what = f"{_NUM_SAMPLES} samples of a prompt of {length} tokens, against {_NUM_SAMPLES} requests with"
    wanted = {
        "prompts": (f"{what} prompts of their own of that length", _SHARING_TARGET, ""),
        "requests": (f"{what} that prompt", None, "requests that wait together share their prompt, too"),
    }
    return [
        bench.ratio(
            text,
            taken,
            name,
            "samples",
            num_tokens=_NUM_SAMPLES * num_new,
            at_least=target,
            note=note,
        )
        for name, (text, target, note) in wanted.items()
    ]
