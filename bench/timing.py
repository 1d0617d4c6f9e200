"""Times candidates in turn, so that a machine that gets slower meanwhile slows all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from gpuworker.engine.memory import free_cache


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Seconds of each candidate, one for each round, and why a candidate dropped out."""

    seconds: Mapping[str, list[float]]
    errors: Mapping[str, str] = field(default_factory=dict)


def alternate(
    candidates: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    device: torch.device,
    until: float = float("inf"),
    warm_ups: Mapping[str, int] | None = None,
) -> Taken:
    """Time each candidate once a round after warming it up.

    Args:
        until: `time.monotonic` after which no further round begins; the first always does.
        warm_ups: calls that do not count, by candidate; else 4 on a GPU, where the engine records what comes back, and 1
            elsewhere.

    A candidate that fails while it is warmed up drops out, the others go on.
    """
    usual, known = 4 if device.type == "cuda" else 1, warm_ups or {}
    seconds: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    for name, run in candidates.items():
        try:
            for _ in range(known.get(name, usual)):
                run()
        except Exception as error:  # noqa: BLE001 - one candidate must not take the others' figures along
            errors[name] = describe(error)
        else:
            seconds[name] = []
        free(device)
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for name in seconds:
            seconds[name].append(timed(candidates[name], device))
    return Taken(seconds=seconds, errors=errors)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, with everything that it has started on the device."""
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give memory that nothing uses back to the device or the system."""
    gc.collect()
    free_cache(device)


def describe(error: BaseException) -> str:
    """Return an error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".replace("|", "/")
