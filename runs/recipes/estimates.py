"""What a run would come to before it is started: rows, tokens, steps, time, memory, disk and its turn.

Counts are exact where the dataset's tokens are in the cache, else from what the doctor measured. Time is a
range from earlier steps on this server and absent before there are any; see `paces` and `footprint`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from django.conf import settings
from django.core.files.storage import FileSystemStorage, default_storage, storages
from django.db.models import Max

from runs.exceptions import RequestInvalid
from runs.models import DatasetVersion, TrainingRun
from runs.recipes import batches, defaults, footprint, paces, tokens
from runs.recipes.footprint import Load, Memory
from runs.recipes.paces import Pace
from runs.schemas.recipes import LoraSettings, SftConfig
from runs.services import base_models, recipe_status, workers
from runs.services.base_models import BaseModelInfo
from runs.services.data_starts import BEGINNING, DataStart

# What a chat template writes around each message: two marks, the role, a line end.
TOKENS_PER_MESSAGE: Final = 5
# A rough rule for a dataset that was checked before the base model's tokenizer was there.
CHARACTERS_PER_TOKEN: Final = 3.5


@dataclass(frozen=True, kw_only=True)
class RowLengths:
    """A dataset's rows as tokens, cut at the run's max length. `share_truncated` is of all rows."""

    num_rows: int
    num_usable: int
    mean: float
    longest: int
    share_truncated: float
    is_exact: bool


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much a run trains on.

    Args:
        num_steps: steps this run does; for a fork that goes on, those after its start.
        num_epochs: how often it sees each row in those steps.
        step_tokens: tokens of one step on average.
        is_exact: False where token counts are an estimate.
    """

    num_rows: int
    num_train_rows: int
    num_validation_rows: int
    num_steps: int
    num_epochs: float
    epoch_tokens: int
    total_tokens: int
    step_tokens: float
    longest_row: int
    share_truncated: float
    is_exact: bool


@dataclass(frozen=True, kw_only=True)
class Disk:
    """What a run's checkpoints take; `free_bytes` is None where the storage cannot tell."""

    checkpoint_bytes: int
    num_kept: int
    free_bytes: int | None

    @property
    def total_bytes(self) -> int:
        return self.checkpoint_bytes * self.num_kept


@dataclass(frozen=True, kw_only=True)
class Turn:
    """When a run started now would begin: position 0 is at once; `starts_in_s` None if nobody can tell."""

    position: int
    starts_in_s: float | None
    has_worker: bool


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """All that is known of a run beforehand; `config` has every open setting decided."""

    config: SftConfig
    amounts: Amounts
    pace: Pace | None
    memory: Memory
    disk: Disk
    turn: Turn

    @property
    def time_range_s(self) -> tuple[float, float] | None:
        """Return the shortest and longest time to expect of the training itself, without its turn in the queue."""
        if self.pace is None:
            return None
        return self.amounts.total_tokens / self.pace.high, self.amounts.total_tokens / self.pace.low


def estimate(
    config: SftConfig,
    versions: Sequence[DatasetVersion],
    *,
    first_step: int = 0,
    data_start: DataStart = BEGINNING,
) -> Estimate:
    """Return what a run with checked settings would come to.

    Args:
        versions: the training dataset and those for validation.
        first_step: where a fork with optimizer state goes on; there it is `data_start` in its data.
    """
    info = base_models.get(config.base_model)
    amounts = amounts_of(config, versions, info, first_step=first_step, data_start=data_start)
    completed = defaults.completed(config, info=info, num_steps=first_step + amounts.num_steps)
    return Estimate(
        config=completed,
        amounts=amounts,
        pace=paces.of_base_model(config.base_model, step_tokens=amounts.step_tokens),
        memory=_memory(completed, amounts, info),
        disk=_disk(completed, amounts, info),
        turn=_turn(),
    )


# -- rows and tokens -----------------------------------------------------------------------------------


def amounts_of(
    config: SftConfig,
    versions: Sequence[DatasetVersion],
    info: BaseModelInfo,
    *,
    first_step: int = 0,
    data_start: DataStart = BEGINNING,
) -> Amounts:
    """Return how much a run with checked settings trains on."""
    version, *others = versions
    rows = lengths_of(version, config, info)
    num_held_out = batches.num_held_out(rows.num_usable, config.validation)
    num_train = max(rows.num_usable - num_held_out, 1)
    batch_rows = _batch_rows(config, rows.mean)
    if config.num_steps is not None:
        num_steps = max(config.num_steps - first_step, 0)
        num_epochs = num_steps * batch_rows / num_train
    else:
        num_epochs = config.num_epochs or defaults.NUM_EPOCHS
        num_rows_left = max(1, math.ceil(num_epochs * num_train)) - data_start.row
        num_steps = max(data_start.step + math.ceil(num_rows_left / batch_rows) - first_step, 0)
    return Amounts(
        num_rows=version.num_rows,
        num_train_rows=num_train,
        num_validation_rows=num_held_out
        + sum(min(other.num_rows, config.validation.max_rows) for other in others),
        num_steps=num_steps,
        num_epochs=num_epochs,
        epoch_tokens=round(rows.mean * num_train),
        total_tokens=round(rows.mean * num_steps * batch_rows),
        step_tokens=rows.mean * batch_rows,
        longest_row=rows.longest,
        share_truncated=rows.share_truncated,
        is_exact=rows.is_exact and config.batch_tokens is None,
    )


def lengths_of(version: DatasetVersion, config: SftConfig, info: BaseModelInfo) -> RowLengths:
    """Return the lengths of a version's rows: exact from the token cache, else from the doctor's report."""
    max_length = config.max_length or defaults.max_length(info)
    try:
        store = tokens.open_store(version, info.name, train_on=config.train_on, max_length=max_length)
    except RequestInvalid:  # the tokenizer is not on this machine before a worker has loaded the model
        store = None
    if store is not None and len(store):
        counts = store.counts
        return RowLengths(
            num_rows=len(store),
            num_usable=int(np.count_nonzero(store.num_trained)),
            mean=counts.num_tokens / len(store),
            longest=int(store.lengths.max()),
            share_truncated=counts.num_truncated_rows / len(store),
            is_exact=True,
        )
    return _reported(version, info.name, max_length)


def _reported(version: DatasetVersion, base_model: str, max_length: int) -> RowLengths:
    report: dict[str, Any] = version.report
    measured = (report.get("tokens") or {}).get(base_model)
    scale = 1.0
    if measured is None:
        measured, scale = report.get("characters") or {}, 1 / CHARACTERS_PER_TOKEN
    added = TOKENS_PER_MESSAGE * sum((report.get("roles") or {}).values()) / max(version.num_rows, 1)
    bins = measured.get("histogram") or []
    num_measured = sum(one["count"] for one in bins)
    if not num_measured:
        return _nothing_known(version, max_length)
    # The middle of a bin overstates long tails, so the bins are scaled to the total that was counted.
    lengths = np.array([(one["low"] + one["high"]) / 2 for one in bins])
    weights = np.array([one["count"] for one in bins]) / num_measured
    mean = measured["total"] / max(version.num_rows, 1)
    middle = float(lengths @ weights)
    lengths = (lengths * (mean / middle if middle else 1.0)) * scale + added
    highs = np.array([one["high"] for one in bins]) * scale + added
    lows = np.array([one["low"] for one in bins]) * scale + added
    above = np.clip((highs - max_length) / np.maximum(highs - lows, 1.0), 0.0, 1.0)
    return RowLengths(
        num_rows=version.num_rows,
        num_usable=version.num_rows,
        mean=float(np.minimum(lengths, max_length) @ weights),
        longest=max(1, min(max_length, round(measured["max"] * scale + added))),
        share_truncated=float(above @ weights),
        is_exact=False,
    )


def _nothing_known(version: DatasetVersion, max_length: int) -> RowLengths:
    mean = min(max_length, version.size_bytes / CHARACTERS_PER_TOKEN / max(version.num_rows, 1))
    return RowLengths(
        num_rows=version.num_rows,
        num_usable=version.num_rows,
        mean=max(mean, 1.0),
        longest=max_length,
        share_truncated=0.0,
        is_exact=False,
    )


def _batch_rows(config: SftConfig, mean: float) -> float:
    """Return the rows of a step; a batch by tokens stays about half a row below its limit."""
    if config.batch_tokens is None:
        return float(config.batch_size)
    return max(1.0, config.batch_tokens / max(mean, 1.0) - 0.5)


# -- memory, disk, turn --------------------------------------------------------------------------------


def _memory(config: SftConfig, amounts: Amounts, info: BaseModelInfo) -> Memory:
    load = Load(
        lora=config.lora,
        longest_row=amounts.longest_row,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
    )
    total = workers.live().aggregate(largest=Max("memory_bytes"))["largest"]
    return footprint.memory_of(load, info.sizes, other_bytes=_held_bytes(info), total_bytes=total or 0)


def _held_bytes(info: BaseModelInfo) -> int:
    """Return what a worker holds beside this run: other base models' weights, and adapters of other runs."""
    infos = {one.name: one for one in base_models.available()}
    weights = sum(one.sizes.weight_bytes for one in infos.values() if one.name != info.name)
    held = TrainingRun.objects.filter(worker__in=workers.live())
    shapes = held.values_list("base_model", "lora_rank", "train_attn", "train_mlp", "train_unembed")
    adapters = [
        footprint.adapter_bytes(
            infos[name].sizes,
            LoraSettings(rank=rank, train_attn=attn, train_mlp=mlp, train_unembed=unembed),
        )
        for name, rank, attn, mlp, unembed in shapes
        if name in infos
    ]
    return weights + sum(adapters)


def _disk(config: SftConfig, amounts: Amounts, info: BaseModelInfo) -> Disk:
    num_saves = max(amounts.num_steps - 1, 0) // (config.save_every or 1)
    return Disk(
        checkpoint_bytes=footprint.checkpoint_bytes(info.sizes, config.lora),
        num_kept=min(num_saves, config.keep_checkpoints) + 1,
        free_bytes=_free_bytes(),
    )


def _free_bytes() -> int | None:
    if not isinstance(storages["default"], FileSystemStorage):
        return None
    folder = Path(default_storage.path(""))
    return shutil.disk_usage(folder if folder.is_dir() else settings.DATA_DIR).free


def _turn() -> Turn:
    position, starts_in_s = recipe_status.outlook()
    return Turn(position=position, starts_in_s=starts_in_s, has_worker=workers.serving().exists())
