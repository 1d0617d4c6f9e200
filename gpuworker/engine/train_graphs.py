"""A training batch in two launches: the decoder and its way back recorded as CUDA graphs.

A pass over a batch of a few hundred tokens is some ten thousand small kernels, and a GPU waits for their launches.
Batches are padded to one of eight sizes an octave, so that what was recorded for a size serves all batches of
that size whichever runs they come from: tokens, bounds of sequences and the adapters' weights are copied
into fixed buffers. Head and loss lie between the two launches and stay as they are, because each job has its own.
Without a CUDA device the same pass runs unrecorded, for tests.
Axes: T rows of the recorded batch, K places of the bank, S most sequences, D hidden features.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpuworker.engine import lora_columns
from gpuworker.engine.attention import PackedAttention
from gpuworker.engine.bank_layout import fitting_rank
from gpuworker.engine.base_model import BaseModel
from gpuworker.engine.batching import PackedRows, power_of_two
from gpuworker.engine.lora import Products
from gpuworker.engine.lora_columns import ColumnProducts
from gpuworker.engine.lora_stack import AdapterRows, GroupedProducts
from gpuworker.engine.memory import is_out_of_memory
from gpuworker.engine.training_bank import TrainingBank

logger = logging.getLogger(__name__)

_MIN_ROWS: Final = 64
_SIZES_AN_OCTAVE: Final = 8
_MIN_SEQUENCES: Final = 8
_MIN_LENGTH: Final = 128
_RUNS_BEFORE_RECORDING: Final = 2
"""Recording costs about two plain passes: sizes that are met only in passing are not worth it."""
_MAX_RECORDED: Final = 32
_BATCHES_BETWEEN_TRIES: Final = 256
"""After a lack of memory so many batches keep to half of the room: each try costs what was recorded so far."""


class Size(NamedTuple):
    """What a recorded pass has room for: rows, sequences and tokens of each, adapters and their rank."""

    num_rows: int
    num_sequences: int
    max_length: int
    num_places: int
    rank: int

    @classmethod
    def of(cls, lengths: Sequence[int], num_places: int, rank: int) -> Size:
        """Return the smallest size for a batch of such sequences."""
        num_rows = recorded_rows(sum(lengths))
        max_length = max(_MIN_LENGTH, power_of_two(max(lengths)))
        num_sequences = len(lengths) + len(_padding(num_rows - sum(lengths), max_length))
        octaves = (power_of_two(max(num_sequences, _MIN_SEQUENCES)) - 1).bit_length()
        return cls(num_rows, 1 << (octaves | 1), max_length, power_of_two(num_places), rank)


class TrainGraphs:
    """Knows the recorded passes of one base model.

    Args:
        row_bytes: about what autograd keeps for one row.
        max_bytes: what the activations of the largest recorded batch may take, and what all banks together may;
            less for a time after memory has run out.
    """

    def __init__(self, base: BaseModel, *, row_bytes: int, max_bytes: int) -> None:
        self._base = base
        self._row_bytes = row_bytes
        self._max_bytes = max_bytes
        self._num_halvings = 0
        self._num_until_try = 0
        self._num_met: Counter[Size] = Counter()
        self._passes: OrderedDict[Size, RecordedPass] = OrderedDict()

    def find(self, rows: PackedRows, parts: Sequence[AdapterRows]) -> RecordedPass | None:
        """Return a pass for these rows, loaded with them; None where they had better go the plain way."""
        rank = fitting_rank([part.adapter.weights for part in parts])
        size = Size.of(rows.lengths, len(parts), rank)
        self._num_met[size] += 1
        self._regain_room()
        if not self._has_room(size) or (self._on_gpu and self._num_met[size] <= _RUNS_BEFORE_RECORDING):
            return None
        try:
            found = self._pass(size)
            if not found.is_ready(self._pool()):
                return None
            found.load(rows, parts)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._halve_room(size)
            return None
        return found

    def release(self) -> None:
        """Let go of everything recorded, and of its memory."""
        self._passes.clear()

    def _halve_room(self, size: Size) -> None:
        self._num_halvings += 1
        self._num_until_try = _BATCHES_BETWEEN_TRIES
        logger.warning(
            "no memory for a recorded pass of %s rows; %s bytes are left", size.num_rows, self._room
        )
        self.release()

    def _regain_room(self) -> None:
        """Take one halving back once so many batches have passed since the last change."""
        if self._num_halvings == 0:
            return
        self._num_until_try -= 1
        if self._num_until_try == 0:
            self._num_halvings -= 1
            self._num_until_try = _BATCHES_BETWEEN_TRIES
            logger.info("recorded passes may take %s bytes again", self._room)

    @property
    def _room(self) -> int:
        return self._max_bytes >> self._num_halvings

    @property
    def _on_gpu(self) -> bool:
        return self._base.device.type == "cuda"

    def _has_room(self, size: Size) -> bool:
        base = self._base
        num_layers = sum(len(group) for group in base.groups)
        num_inner = num_layers * size.num_places * size.rank  # inner products, kept for backward
        row_bytes = self._row_bytes + num_inner * base.dtype.itemsize
        return max(size.num_rows * row_bytes, self._bank_bytes(size)) <= self._room

    def _bank_bytes(self, size: Size) -> int:
        base = self._base
        return TrainingBank.num_bytes(
            base.groups, num_places=size.num_places, rank=size.rank, dtype=base.dtype
        )

    def _pass(self, size: Size) -> RecordedPass:
        """Return the pass of a size; a new one takes the place of those used longest ago, as far as its bank needs room."""
        if size not in self._passes:
            self._passes[size] = RecordedPass(self._base, size, self._bank(size))
            while len(self._passes) > _MAX_RECORDED:
                self._passes.popitem(last=False)
        self._passes.move_to_end(size)
        return self._passes[size]

    def _bank(self, size: Size) -> TrainingBank:
        """Return the bank that passes of so many places and such a rank share."""
        key = (size.num_places, size.rank)
        for other, found in self._passes.items():
            if (other.num_places, other.rank) == key:
                return found.bank
        self._make_room(self._bank_bytes(size))
        base = self._base
        return TrainingBank(
            base.groups, num_places=size.num_places, rank=size.rank, device=base.device, dtype=base.dtype
        )

    def _make_room(self, num_bytes: int) -> None:
        """Forget passes used longest ago until a bank more fits beside those of the others."""
        while self._passes and num_bytes + self._held_bytes() > self._room:
            self._passes.popitem(last=False)

    def _held_bytes(self) -> int:
        banks = {(size.num_places, size.rank): size for size in self._passes}
        return sum(self._bank_bytes(size) for size in banks.values())

    def _pool(self) -> Any:
        """Return the memory that all share, as none is under way while another is: that of any recorded pass."""
        return next((some.pool for some in self._passes.values() if some.pool is not None), None)


class RecordedPass:
    """The fixed buffers of one size of batch, and the graphs of both directions once they are recorded."""

    def __init__(self, base: BaseModel, size: Size, bank: TrainingBank) -> None:
        num_rows = size.num_rows
        self._base = base
        self.bank = bank
        self.mixes = bank.layout.num_columns <= lora_columns.MAX_COLUMNS
        self._num_rows = num_rows
        self._rows_2T = torch.zeros(2, num_rows, dtype=torch.int64, device=base.device)
        self._ends_K = torch.zeros(bank.layout.num_places, dtype=torch.int32, device=base.device)
        self._scaling_T1 = torch.zeros(num_rows, 1, device=base.device)
        self._gradient_TD = torch.zeros(
            num_rows, base.config.hidden_size, device=base.device, dtype=base.dtype
        )
        self._attend = _FixedAttention(size, base.device)
        self._parts: Sequence[AdapterRows] = ()
        self._is_recordable = base.device.type == "cuda"
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None
        self._hidden_TD = torch.empty(0)

    @property
    def pool(self) -> Any:
        """Return the memory pool of what is recorded, None where nothing is."""
        return None if self._graphs is None else self._graphs[0].pool()

    def is_ready(self, pool: Any) -> bool:
        """Record the pass where that is still to do, and return whether it can run.

        A pass that cannot be recorded is left to the plain way for good; a lack of memory is raised.
        """
        if self._is_recordable and self._graphs is None:
            try:
                self._record(pool)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self._is_recordable = False
                logger.warning("a training pass of %s rows cannot be recorded: %s", self._num_rows, error)
        return self._graphs is not None or self._base.device.type != "cuda"

    def load(self, rows: PackedRows, parts: Sequence[AdapterRows]) -> None:
        """Say what the next run is about: the rows, whose they are, and with which weights."""
        num_rows = len(rows.tokens_T)
        rows_2T = np.zeros((2, self._num_rows), dtype=np.int64)
        rows_2T[:, :num_rows] = rows.tokens_T, rows.positions_T
        # What is missing to T rows counts as the last place's, with a share of nothing.
        ends_K = np.full(len(self._ends_K), self._num_rows, dtype=np.int32)
        scaling_T1 = np.zeros((self._num_rows, 1), dtype=np.float32)
        for place, (segment, adapter, _) in enumerate(parts):
            ends_K[place : len(ends_K) - 1] = segment.stop
            scaling_T1[segment.start : segment.stop] = adapter.weights.scaling
        self._rows_2T.copy_(torch.from_numpy(rows_2T), non_blocking=True)
        self._ends_K.copy_(torch.from_numpy(ends_K), non_blocking=True)
        self._scaling_T1.copy_(torch.from_numpy(scaling_T1), non_blocking=True)
        self.bank.put(parts)
        self._attend.load(rows.lengths)
        self._parts, self._num_loaded = parts, num_rows

    def forward(self) -> Tensor:
        """Return the last hidden states (T, D) of the rows that were loaded."""
        if self._graphs is None:
            self._hidden_TD = self._compute()
        else:
            self._replay(self._graphs[0])
        return self._hidden_TD.detach()[: self._num_loaded]

    def zero_gradient(self) -> Tensor:
        """Return zeros (T, D)."""
        return self._gradient_TD.zero_()[: self._num_loaded]

    def backward(self) -> None:
        """Add the adapters' gradients to those of the jobs."""
        if self._graphs is None:
            torch.autograd.backward(self._hidden_TD, self._gradient_TD)
        else:
            self._replay(self._graphs[1])
        self.bank.hand_over(self._parts)
        self._parts = ()

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        with torch.cuda.device(self._base.device):
            graph.replay()

    def _record(self, pool: Any) -> None:
        with torch.cuda.device(self._base.device):
            torch.cuda.synchronize()
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(forward, pool=pool, capture_error_mode="thread_local"):
                hidden_TD = self._compute()
            with torch.cuda.graph(backward, pool=forward.pool(), capture_error_mode="thread_local"):
                torch.autograd.backward(hidden_TD, self._gradient_TD)
        self._graphs, self._hidden_TD = (forward, backward), hidden_TD.detach()

    def _compute(self) -> Tensor:
        tokens_T, positions_T = self._rows_2T
        with torch.enable_grad(), self._base.routed((self._products(),), self._attend):
            return self._base.hidden_of(tokens_T, positions_T)

    def _products(self) -> Products:
        bank, layout = self.bank, self.bank.layout
        if self.mixes:
            weights, gradients = layout.columns(bank.weights_Q), layout.columns(bank.gradients_Q)
            return ColumnProducts(weights, gradients, self._share())
        bank.gradients_Q.zero_()
        return GroupedProducts(
            layout.pairs(bank.weights_Q),
            layout.pairs(bank.gradients_Q),
            rows=slice(0, self._num_rows),
            ends_G=self._ends_K,
            scaling_N1=self._scaling_T1,
        )

    def _share(self) -> Tensor:
        """Return alpha / rank in the columns of each row's own adapter, else 0, (T, C)."""
        device = self._base.device
        rows_T = torch.arange(self._num_rows, dtype=torch.int32, device=device)
        places_T = torch.bucketize(rows_T, self._ends_K, right=True)
        is_own_TC = places_T[:, None] == self.bank.layout.column_places(device)
        return torch.where(is_own_TC, self._scaling_T1, 0.0)


class _FixedAttention(PackedAttention):
    """Attention over at most S sequences of a limited length, whose bounds are read when the kernel runs."""

    def __init__(self, size: Size, device: torch.device) -> None:
        super().__init__([size.num_rows], device=device)
        self.max_length = size.max_length
        self.bounds = torch.zeros(size.num_sequences + 1, dtype=torch.int32, device=device)
        self._num_rows = size.num_rows

    def load(self, lengths: Sequence[int]) -> None:
        """Take the lengths of the next batch; what is missing to T rows attends to itself."""
        self.lengths = [*lengths, *_padding(self._num_rows - sum(lengths), self.max_length)]
        ends = np.full(len(self.bounds), self._num_rows, dtype=np.int32)
        ends[0] = 0
        ends[1 : len(self.lengths) + 1] = np.cumsum(self.lengths)
        self.bounds.copy_(torch.from_numpy(ends), non_blocking=True)


def _padding(num_rows: int, max_length: int) -> list[int]:
    """Return the lengths of sequences that so many rows of padding make up."""
    full, rest = divmod(num_rows, max_length)
    return [max_length] * full + [rest] * (rest > 0)


def recorded_rows(num_rows: int) -> int:
    """Return the size that a batch is padded to: the next of eight steps between two powers of two."""
    step = max(_MIN_ROWS, power_of_two(num_rows) // 2) // _SIZES_AN_OCTAVE
    return max(_MIN_ROWS, -(-num_rows // step) * step)
