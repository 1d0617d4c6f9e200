"""What the first process of a group tells its followers, as pickles through a pipe of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from gpuworker.engine.residency import AdapterMemory


@dataclass(frozen=True, kw_only=True)
class Load:
    """Load a base model; the first process does the same."""

    directory: Path
    dtype: str
    adapter_memory: AdapterMemory
    num_threads: int


@dataclass(frozen=True)
class Loaded:
    """Whether the first process could load what it asked for last."""

    succeeded: bool


@dataclass(frozen=True, kw_only=True)
class Call:
    """Call a method of an engine, counted in the order of loading, or of its sampler."""

    engine: int
    is_sampler: bool
    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Message: TypeAlias = Load | Loaded | Call
