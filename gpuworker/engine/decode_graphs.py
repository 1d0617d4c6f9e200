"""One token for every running sequence in one launch: decode steps recorded as CUDA graphs.

A step is some thousand small kernels, and a GPU waits for their launches. All that changes between
steps lies in fixed buffers (tokens, positions, slots, who uses which adapter), so that a step of one size is
recorded once and replayed. Without a CUDA device the same step runs unrecorded, for tests.
Axes: S sequences of a step, C cached positions, G key/value heads, M query heads of each, E head size,
K places of the adapter bank, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from gpuworker.engine import lora_columns
from gpuworker.engine.adapter_bank import AdapterBank, BankedProducts
from gpuworker.engine.adapters import UNEMBED, LoraWeights
from gpuworker.engine.bank_layout import fitting_rank
from gpuworker.engine.base_model import BaseModel
from gpuworker.engine.batching import power_of_two
from gpuworker.engine.kv_cache import KVCache
from gpuworker.engine.logprobs import Head
from gpuworker.engine.lora import Scoring
from gpuworker.engine.lora_decode import SampledRows
from gpuworker.engine.memory import is_out_of_memory

logger = logging.getLogger(__name__)

_MIN_POSITIONS = 128
_RUNS_BEFORE_RECORDING = 3
"""Recording takes several times as long as running: sizes that are met only in passing are not worth it."""

_MANY_TIMES = 4
"""A bank of more columns than a prompt's products may have gives way to one with so many times fewer."""


def can_record(base: BaseModel) -> bool:
    """Return whether steps may be recorded: sums over a group are not."""
    return base.group.is_alone


class NewToken(NamedTuple):
    """The newest token of one sequence, the position and slot it belongs to, and whose weights it goes through."""

    token: int
    position: int
    slot: int
    weights: LoraWeights | None


class SlotAttention:
    """Attention of one new token for each sequence over the first C positions of its slot.

    A flash kernel reads the slots where they lie; where there is none for the case, copies of them are masked.
    """

    def __init__(self, cache: KVCache, slots_S: Tensor, positions_S: Tensor, num_positions: int) -> None:
        self._cache = cache
        self._slots_S = slots_S
        self._positions_S = positions_S
        self._num_positions = num_positions
        self._lengths_S = (positions_S + 1).int()
        # The kernel wants a bound more than there are sequences, and reads of the keys' bounds the first of each alone.
        self._starts = functional.pad(slots_S * cache.num_positions, (0, 1)).int()
        self._bounds = torch.arange(len(slots_S) + 1, dtype=torch.int32, device=cache.device)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Store the new keys and values and return the attention output.

        Shapes:
            query: (1, G * M, S, E); key, value: (1, G, S, E); returns (1, S, G * M, E).
        """
        pools = self._cache.pools(layer, key[0].transpose(0, 1))
        for pool, new in zip(pools, (key, value), strict=True):
            pool[self._slots_S, self._positions_S] = new[0].transpose(0, 1).to(pool.dtype)
        if query.is_cuda and query.dtype != torch.float32 and scoring.softcap is None:
            return self._attend_in_place(query, *pools, scoring)
        return self._attend_to_copies(query, *pools, scoring)

    def _attend_in_place(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
        scaling, window, _ = scoring
        output_SHE, *_ = torch.ops.aten._flash_attention_forward(
            query[0].transpose(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            self._bounds,
            self._starts,
            1,
            self._num_positions,
            0.0,
            is_causal=False,
            return_debug_mask=False,
            scale=scaling,
            window_size_left=-1 if window is None else window - 1,
            window_size_right=-1 if window is None else 0,
            seqused_k=self._lengths_S,
        )
        return cast(Tensor, output_SHE)[None]

    def _attend_to_copies(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
        scaling, window, softcap = scoring
        key_SGCE, value_SGCE = (
            pool[:, : self._num_positions].index_select(0, self._slots_S).transpose(1, 2)
            for pool in (keys, values)
        )
        num_rows, num_groups, _, size = key_SGCE.shape
        query_SGME = query[0].transpose(0, 1).reshape(num_rows, num_groups, -1, size).to(key_SGCE.dtype)
        scores_SGMC = query_SGME.matmul(key_SGCE.transpose(2, 3)).float().mul_(scaling)
        if softcap is not None:
            scores_SGMC = scores_SGMC.div_(softcap).tanh_().mul_(softcap)
        scores_SGMC.masked_fill_(~self._allowed(window)[:, None, None, :], float("-inf"))
        output_SGME = torch.softmax(scores_SGMC, dim=-1).to(value_SGCE.dtype).matmul(value_SGCE)
        return output_SGME.reshape(1, num_rows, -1, size).to(query.dtype)

    def _allowed(self, window: int | None) -> Tensor:
        ends_S1 = self._positions_S[:, None]
        keys_1C = torch.arange(self._num_positions, device=ends_S1.device)[None]
        seen_SC = keys_1C <= ends_S1
        return seen_SC if window is None else seen_SC & (keys_1C > ends_S1 - window)


class _Step:
    """The fixed buffers of one size of step, and its graph once it is recorded; `rows_3S` holds tokens, positions, slots."""

    def __init__(self, num_rows: int, num_positions: int, bank: AdapterBank, base: BaseModel) -> None:
        self.num_rows = num_rows
        self.num_positions = num_positions
        self.bank = bank
        self.rows_3S = torch.zeros(3, num_rows, dtype=torch.int64, device=base.device)
        self.places_S = torch.zeros(num_rows, dtype=torch.int64, device=base.device)
        self.num_runs = 0
        self.is_recordable = base.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits_SV = torch.empty(0)

    def fill(self, rows: Sequence[NewToken], places: Sequence[int]) -> None:
        """Say what the next run is about; copies of the last row fill the buffers up, which writes what it writes."""
        missing = self.num_rows - len(rows)
        rows, places = [*rows, *[rows[-1]] * missing], [*places, *[places[-1]] * missing]
        numbers = [[r.token for r in rows], [r.position for r in rows], [r.slot for r in rows]]
        self.rows_3S.copy_(torch.tensor(numbers), non_blocking=True)
        self.places_S.copy_(torch.tensor(places), non_blocking=True)


class DecodeGraphs:
    """Runs the decode steps of one base model.

    Args:
        max_bytes: what the bank may take, and what the keys and values of a layer that a step may have to copy may.
    """

    def __init__(self, base: BaseModel, head: Head, cache: KVCache, *, max_bytes: int) -> None:
        self._base = base
        self._head = head
        self._cache = cache
        self._max_bytes = max_bytes
        self._steps: dict[tuple[int, int], _Step] = {}
        self._cache_version = cache.version
        self._bank: AdapterBank | None = None

    def _has_room(self, rows: Sequence[NewToken]) -> bool:
        """Return whether such a step keeps to `max_bytes`."""
        base = self._base
        size, length = self._size(rows)
        layer_bytes = base.cache_bytes_per_position(self._cache.dtype) // base.config.num_hidden_layers
        adapters = _distinct(row.weights for row in rows)
        return size * length * layer_bytes <= self._max_bytes and self._has_room_for(adapters)

    def products(self, segments: Sequence[SampledRows], num_rows: int) -> BankedProducts | None:
        """Return the products of a batch with prompts in it; None where every adapter had better go by itself."""
        adapters = _distinct(segment.weights for segment in segments)
        num_places, rank = self._bank_size(adapters)
        if not adapters or num_places * rank > lora_columns.MAX_COLUMNS or not self._has_room_for(adapters):
            return None
        bank = self._fitting_bank(adapters)
        found = bank.places(adapters)
        if any(bank.is_ill(one) for one in adapters):
            return None
        places_T = torch.full((num_rows,), bank.num_places)
        for start, stop, weights in segments:
            places_T[start:stop] = found[id(weights)]
        return BankedProducts(bank, places_T.to(self._cache.device))

    def logits(self, rows: Sequence[NewToken]) -> Tensor | None:
        """Return the logits (S, V), float32, after the rows; they are overwritten by the next call.

        None where the step had better go the plain way: it has no room, or an adapter that is not finite.
        """
        if not self._has_room(rows):
            return None
        adapters = _distinct(row.weights for row in rows)
        bank = self._fitting_bank(adapters)
        found = bank.places(adapters)
        if any(bank.is_ill(one) for one in adapters):
            return None
        step = self._step(bank, *self._size(rows))
        step.fill(rows, [bank.num_places if row.weights is None else found[id(row.weights)] for row in rows])
        return self._run(step)[: len(rows)]

    def release(self) -> None:
        """Let go of the bank, the buffers and what was recorded."""
        self._steps.clear()
        self._bank = None

    def _size(self, rows: Sequence[NewToken]) -> tuple[int, int]:
        """Return the powers of two of rows and positions that the step is computed for."""
        num_positions = max(row.position for row in rows) + 1
        length = max(_MIN_POSITIONS, power_of_two(num_positions))
        return power_of_two(len(rows)), min(length, self._cache.num_positions)

    def _has_room_for(self, adapters: Sequence[LoraWeights]) -> bool:
        base = self._base
        num_places, rank = self._bank_size(adapters)
        num_bytes = AdapterBank.num_bytes(base.groups, num_places=num_places, rank=rank, dtype=base.dtype)
        return num_bytes <= self._max_bytes

    def _bank_size(self, adapters: Sequence[LoraWeights]) -> tuple[int, int]:
        """Return places and rank of a bank for these adapters, no smaller than the present one unless that is far too large."""
        num_places, rank = power_of_two(max(1, len(adapters))), fitting_rank(adapters)
        limit = max(lora_columns.MAX_COLUMNS, _MANY_TIMES * num_places * rank)
        if self._bank is None or self._bank.num_columns > limit:
            return num_places, rank
        return max(num_places, self._bank.num_places), max(rank, self._bank.rank)

    def _fitting_bank(self, adapters: Sequence[LoraWeights]) -> AdapterBank:
        """Return a bank that holds the adapters; what was recorded with a smaller one goes."""
        num_places, rank = self._bank_size(adapters)
        if self._bank is None or (num_places, rank) != (self._bank.num_places, self._bank.rank):
            self.release()
            base = self._base
            self._bank = AdapterBank(
                base.groups, num_places=num_places, rank=rank, device=base.device, dtype=base.dtype
            )
        return self._bank

    def _step(self, bank: AdapterBank, size: int, length: int) -> _Step:
        if self._cache.version != self._cache_version:
            self._steps.clear()
            self._cache_version = self._cache.version
        if (size, length) not in self._steps:
            self._steps[size, length] = _Step(size, length, bank, self._base)
        return self._steps[size, length]

    def _run(self, step: _Step) -> Tensor:
        step.num_runs += 1
        if step.graph is None and step.is_recordable and step.num_runs > _RUNS_BEFORE_RECORDING:
            self._try_to_record(step)
        if step.graph is None:
            return self._compute(step)
        with torch.cuda.device(self._cache.device):
            step.graph.replay()
        return step.logits_SV

    def _try_to_record(self, step: _Step) -> None:
        try:
            self._record(step)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            step.is_recordable = False
            logger.warning("a decode step of %s rows cannot be recorded: %s", step.num_rows, error)

    def _record(self, step: _Step) -> None:
        """Record a step; all share one pool of memory, as none is running while another does."""
        with torch.cuda.device(self._cache.device):
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool(), capture_error_mode="thread_local"):
                logits_SV = self._compute(step)
        step.graph, step.logits_SV = graph, logits_SV

    def _pool(self) -> Any:
        """Return the pool of a graph that is still held: one whose graphs are all gone cannot be used again."""
        return next((step.graph.pool() for step in self._steps.values() if step.graph is not None), None)

    def _compute(self, step: _Step) -> Tensor:
        tokens_S, positions_S, slots_S = step.rows_3S
        attend = SlotAttention(self._cache, slots_S, positions_S, step.num_positions)
        products = BankedProducts(step.bank, step.places_S)
        with self._base.routed((), attend, sampled=products):
            hidden_SD = self._base.hidden_of(tokens_S, positions_S)
        logits_SV = self._head.base_logits(hidden_SD)
        products.add(logits_SV, hidden_SD, UNEMBED)
        return self._head.cap(logits_SV)


def _distinct(weights: Iterable[LoraWeights | None]) -> list[LoraWeights]:
    """Return the adapters among them, each once."""
    return list({id(one): one for one in weights if one is not None}.values())
