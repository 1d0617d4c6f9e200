"""What a replay must give again: the stored bytes, or numbers close to them on another engine or a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from gpuworker.engine.types import Float32Array
from runs.schemas import results

# How far a log-probability (or a loss, by its size) may be from the stored one, by the base model's dtype.
TOLERANCES: Final = {"float32": 1e-3, "bfloat16": 0.25}


@dataclass(frozen=True, kw_only=True)
class Engines:
    """How the present engine differs from those that computed before, in words; empty when it does not."""

    differences: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(self.differences)

    def __bool__(self) -> bool:
        return bool(self.differences)


def differences(earlier: Iterable[Mapping[str, str]], present: Mapping[str, str]) -> Engines:
    """Return what of the present engine's fingerprint is another than in one of the earlier ones.

    A key that only one side knows says nothing: older versions recorded less. But what does not tell its code is
    of a version before the present one.
    """
    found: dict[str, None] = {}
    for fingerprint in earlier:
        pair = ({"code": "unknown", **fingerprint}, present)
        for key in sorted(pair[0].keys() & present.keys()):
            # Which of several equal devices it was makes no difference.
            before, now = (
                values[key].partition(":")[0] if key == "device" else values[key] for values in pair
            )
            if before != now:
                name = key.replace("_", " ")
                found[f"{name} {before} -> {now}"] = None
    return Engines(differences=tuple(found))


def largest_difference(stored: bytes, replayed: bytes) -> float:
    """Return the largest |a - b| / max(1, |a|) over log-probabilities and metrics; infinite where the shapes differ."""
    if stored == replayed:
        return 0.0
    before_arrays, before_metrics = results.decode_forward_backward(stored)
    now_arrays, now_metrics = results.decode_forward_backward(replayed)
    if before_metrics.keys() != now_metrics.keys() or _shapes(before_arrays) != _shapes(now_arrays):
        return float("inf")
    metrics = [
        abs(before_metrics[name] - now_metrics[name]) / max(1.0, abs(before_metrics[name]))
        for name in before_metrics
    ]
    arrays = [_largest(before, now) for before, now in zip(before_arrays, now_arrays, strict=True)]
    return max([*metrics, *arrays], default=0.0)


def _shapes(arrays: Iterable[Float32Array]) -> list[tuple[int, ...]]:
    return [array.shape for array in arrays]


def _largest(before: Float32Array, now: Float32Array) -> float:
    return float(np.max(np.abs(before - now) / np.maximum(1.0, np.abs(before)), initial=0.0))
