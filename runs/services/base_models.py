"""The base models on offer: what the settings name and what a worker made of it. Knows no torch."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from django.conf import settings
from django.db.models.functions import Now
from huggingface_hub import try_to_load_from_cache

from runs.exceptions import BaseModelAway
from runs.models import BaseModel, Worker
from runs.services.workers import live

_CACHE_S: Final = 2.0
_cache: tuple[float, list[BaseModelInfo]] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What training on a base model takes, as its worker counts it; all 0 until one has told.

    Args:
        weight_bytes: the frozen weights.
        attn_width, mlp_width, unembed_width: input and output features of those projections added up, which
            is the number of an adapter's parameters for each unit of rank.
        working_bytes: of one adapter parameter in the base model's dtype, 0 where that is the master's.
        row_bytes: what is kept for the backward pass for each token that goes through at once.
        batch_rows: tokens that go through at once; a longer row goes through alone.
        head_bytes: the logits of one piece of rows with their gradient.
    """

    weight_bytes: int = 0
    attn_width: int = 0
    mlp_width: int = 0
    unembed_width: int = 0
    working_bytes: int = 0
    row_bytes: int = 0
    batch_rows: int = 0
    head_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class BaseModelInfo:
    """One base model. The sizes are 0 until a worker has loaded it; `error` says why one could not.

    `precision` is the dtype of the weights and why it was chosen.
    """

    name: str
    directory: str
    vocab_size: int = 0
    max_context: int = 0
    max_rank: int = 0
    num_parameters: int = 0
    architecture: str = ""
    precision: str = ""
    error: str = ""
    sizes: ModelSizes = ModelSizes()

    @property
    def is_loaded(self) -> bool:
        """Whether some worker has it in memory."""
        return self.vocab_size > 0 and not self.error

    @property
    def tokenizer_id(self) -> str:
        """What a client gives to AutoTokenizer: the folder when there is one, else the name."""
        return self.directory if Path(self.directory).is_dir() else self.name

    @property
    def folder(self) -> Path | None:
        """Where its files are on this machine: the folder, or the hub's cache once a worker has downloaded it."""
        if Path(self.directory).is_dir():
            return Path(self.directory)
        try:
            found = try_to_load_from_cache(self.directory, "config.json")
        except ValueError:  # no name of the hub's
            return None
        return Path(found).parent if isinstance(found, str) else None


def available() -> list[BaseModelInfo]:
    """Return every configured base model, in the order of the settings."""
    global _cache
    if _cache is None or _cache[0] < time.monotonic():
        _cache = (time.monotonic() + _CACHE_S, _read())
    return _cache[1]


def get(name: str, *, place: str = "base_model") -> BaseModelInfo:
    """Return a configured base model that has no load error, for what is to be made on it.

    What is made already waits until the base model can be loaded again: see `find`.

    Raises:
        BaseModelAway: it is not configured, or could not be loaded.
    """
    for info in available():
        if info.name == name:
            if info.error:
                raise BaseModelAway(f"base model {name!r} could not be loaded: {info.error}", place=place)
            return info
    allowed = ", ".join(repr(info.name) for info in available())
    raise BaseModelAway(f"unknown base model {name[:80]!r}; this server offers {allowed}", place=place)


def find(name: str) -> BaseModelInfo | None:
    """Return a configured base model, loaded or not."""
    return next((info for info in available() if info.name == name), None)


def report(worker: Worker, info: BaseModelInfo) -> None:
    """Record what a worker found when it loaded a base model; an error only where no other worker serves it."""
    if info.error and live().exclude(pk=worker.pk).filter(fingerprint__has_key=info.name).exists():
        return
    BaseModel.objects.update_or_create(
        name=info.name,
        defaults={
            "directory": info.directory,
            "worker": worker,
            "error": info.error,
            "architecture": info.architecture,
            "precision": info.precision,
            "vocab_size": info.vocab_size,
            "max_context": info.max_context,
            "max_rank": info.max_rank,
            "num_parameters": info.num_parameters,
            "sizes": asdict(info.sizes),
            "reported_at": Now(),
        },
    )
    global _cache
    _cache = None


def _read() -> list[BaseModelInfo]:
    rows = {row.name: row for row in BaseModel.objects.all()}
    return [_info(name, str(directory), rows.get(name)) for name, directory in settings.BASE_MODELS.items()]


def _info(name: str, directory: str, row: BaseModel | None) -> BaseModelInfo:
    if row is None:
        return BaseModelInfo(name=name, directory=directory)
    return BaseModelInfo(
        name=name,
        directory=row.directory or directory,
        vocab_size=row.vocab_size,
        max_context=row.max_context,
        max_rank=row.max_rank,
        num_parameters=row.num_parameters,
        architecture=row.architecture,
        precision=row.precision,
        error=row.error,
        sizes=ModelSizes(**row.sizes),
    )
