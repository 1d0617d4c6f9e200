"""What a run takes of a device's memory and of the disk: arithmetic on what the worker reports, no rows.

The memory of a training process is the sum of

    its own code and buffers                      PROCESS_BYTES
    the frozen weights of all base models         weight_bytes each
    the adapter                                   P * (4 master + 8 Adam moments + 4 gradient + working copy)
    what is kept for the backward pass            rows at once * row_bytes * KEPT_FACTOR
    the logits of one piece with their gradient   head_bytes

where P = rank * (widths of the trained projections) and the rows at once are those of one pass: a batch is
cut into passes of at most `batch_rows` tokens, a longer row goes through alone. So a larger batch takes more
memory only until it fills a pass. Sampling takes more while it runs; it gives way when there is no room.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from runs.schemas.recipes import LoraSettings
from runs.services.base_models import ModelSizes

# Measured on a CPU: 0.37 to 0.40 GB before the weights; a CUDA context takes about as much on its device.
PROCESS_BYTES: Final = 450_000_000
# The worker counts 12 hidden and 4 intermediate vectors a token and layer. Measured with models of 256 and 512
# hidden features, 512 to 4000 tokens at once: 1.2 to 1.3 times that at the peak.
KEPT_FACTOR: Final = 1.3
_MASTER_BYTES, _MOMENTS_BYTES, _GRADIENT_BYTES = 4, 8, 4
_TIGHT_SHARE: Final = 0.85
# No remedy cuts rows or batches below this many tokens.
_SHORTEST: Final = 64


class Fit(StrEnum):
    """How a run's needs compare with the memory there is."""

    FITS = "fits"
    TIGHT = "tight"
    TOO_LARGE = "will not fit"
    UNKNOWN = "not known"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What of a run's settings and data memory depends on.

    Args:
        longest_row: tokens of the longest row after it was cut.
        batch_size: rows of a step; `batch_tokens` instead, if it is not None.
    """

    lora: LoraSettings
    longest_row: int
    batch_size: int
    batch_tokens: int | None = None

    def rows_at_once(self, batch_rows: int) -> int:
        """Return the tokens of the largest pass."""
        step = self.batch_size * self.longest_row if self.batch_tokens is None else self.batch_tokens
        return max(self.longest_row, min(step, batch_rows))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A run's needs: all bytes of the process, those of the frozen weights in it, and what would make it fit."""

    fit: Fit
    needed_bytes: int
    weight_bytes: int
    total_bytes: int
    remedy: str


def num_adapter_parameters(sizes: ModelSizes, lora: LoraSettings) -> int:
    """Return P, the parameters of an adapter."""
    width = (
        lora.train_attn * sizes.attn_width
        + lora.train_mlp * sizes.mlp_width
        + lora.train_unembed * sizes.unembed_width
    )
    return lora.rank * width


def checkpoint_bytes(sizes: ModelSizes, lora: LoraSettings) -> int:
    """Return what one checkpoint with optimizer state takes on the disk, all of it in float32."""
    return num_adapter_parameters(sizes, lora) * (_MASTER_BYTES + _MOMENTS_BYTES)


def adapter_bytes(sizes: ModelSizes, lora: LoraSettings) -> int:
    """Return what an adapter takes in memory while it is trained."""
    each = _MASTER_BYTES + _MOMENTS_BYTES + _GRADIENT_BYTES + sizes.working_bytes
    return num_adapter_parameters(sizes, lora) * each


def memory_of(load: Load, sizes: ModelSizes, *, other_bytes: int, total_bytes: int) -> Memory:
    """Return how a run fits a device.

    Args:
        other_bytes: what the device holds already: other base models, adapters of other runs.
        total_bytes: of the device, or of the machine for a worker without one; 0 if nobody has told.
    """
    if not total_bytes or not sizes.row_bytes:
        return Memory(fit=Fit.UNKNOWN, needed_bytes=0, weight_bytes=0, total_bytes=total_bytes, remedy="")
    needed = _needed(load, sizes) + other_bytes
    fit = _fit(needed, total_bytes)
    remedy = "" if fit is Fit.FITS else _remedy(load, sizes, room=total_bytes - other_bytes)
    return Memory(
        fit=fit,
        needed_bytes=needed,
        weight_bytes=sizes.weight_bytes,
        total_bytes=total_bytes,
        remedy=remedy,
    )


def _needed(load: Load, sizes: ModelSizes) -> int:
    kept = load.rows_at_once(sizes.batch_rows) * sizes.row_bytes * KEPT_FACTOR
    return int(PROCESS_BYTES + sizes.weight_bytes + adapter_bytes(sizes, load.lora) + kept + sizes.head_bytes)


def _fit(needed: int, total: int) -> Fit:
    if needed > total:
        return Fit.TOO_LARGE
    return Fit.TIGHT if needed > _TIGHT_SHARE * total else Fit.FITS


def _remedy(load: Load, sizes: ModelSizes, *, room: int) -> str:
    """Return the smallest change of one setting, or of a few, that makes the run fit with room to spare."""
    for words, smaller in _smaller(load):
        if _needed(smaller, sizes) <= _TIGHT_SHARE * room:
            return words
    return "no setting of this run helps; choose a smaller base model or another device"


def _smaller(load: Load) -> Iterator[tuple[str, Load]]:
    """Yield smaller loads with what to change: the batch alone, then no more of the rows' ends than needed."""
    lengths = [length for length in _halves(load.longest_row) if length >= _SHORTEST]
    ranks = list(_halves(load.lora.rank))
    for smaller in _smaller_batches(load):
        yield f"lower {_batch_of(smaller)}", smaller
    for length in lengths:
        words, shorter = f"lower the max length to {_grouped(length)}", replace(load, longest_row=length)
        yield words, shorter
        alone = _one_row_at_once(shorter)
        yield f"{words} and {_batch_of(alone)}", alone
    for rank in ranks:
        yield f"lower the LoRA rank to {rank}", _with_rank(load, rank)
    for length in lengths:
        alone = _one_row_at_once(replace(load, longest_row=length))
        for rank in ranks[-1:]:
            words = (
                f"lower the max length to {_grouped(length)}, {_batch_of(alone)} and the LoRA rank to {rank}"
            )
            yield words, _with_rank(alone, rank)


def _smaller_batches(load: Load) -> Iterator[Load]:
    if load.batch_tokens is None:
        yield from (replace(load, batch_size=size) for size in _halves(load.batch_size))
    else:
        sizes = [size for size in _halves(load.batch_tokens) if size >= _SHORTEST]
        yield from (replace(load, batch_tokens=size) for size in sizes)


def _one_row_at_once(load: Load) -> Load:
    if load.batch_tokens is None:
        return replace(load, batch_size=1)
    return replace(load, batch_tokens=min(load.batch_tokens, load.longest_row))


def _batch_of(load: Load) -> str:
    if load.batch_tokens is None:
        return f"the batch size to {load.batch_size}"
    return f"the batch to {_grouped(load.batch_tokens)} tokens"


def _with_rank(load: Load, rank: int) -> Load:
    return replace(load, lora=load.lora.model_copy(update={"rank": rank}))


def _halves(value: int) -> Iterator[int]:
    """Yield the powers of two below a value, the largest first."""
    power = 1 << (value - 1).bit_length() >> 1 if value > 1 else 0
    while power:
        yield power
        power >>= 1


def _grouped(value: int) -> str:
    return f"{value:,}"
