"""One token for every running sequence in one launch: decode steps recorded as CUDA graphs.

A step is some thousand small kernels, and a GPU waits for their launches: on an H200 a model of 28
layers took 46 ms a step for one sequence, and 1.6 ms recorded. All that changes between steps lies in
fixed buffers (tokens, positions, slots, who uses which adapter), so that a step of one size is
recorded once and replayed. Without a CUDA device the same step runs unrecorded, for tests.
Axes: S sequences of a step, C cached positions, G key/value heads, M query heads of each, E head size,
K places of the adapter bank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpuworker.engine.adapter_bank import AdapterBank, fitting_rank
from gpuworker.engine.adapters import UNEMBED, LoraWeights
from gpuworker.engine.base_model import BaseModel
from gpuworker.engine.kv_cache import KVCache
from gpuworker.engine.logprobs import Head
from gpuworker.engine.lora import RoutedLinear
from gpuworker.engine.products import frozen_linear

_MIN_POSITIONS = 128
_MIN_PLACES = 4
_RUNS_BEFORE_RECORDING = 3
"""Recording takes several times as long as running: sizes that are met only in passing are not worth it."""


def can_record(base: BaseModel) -> bool:
    """Return whether the device has the grouped kernels that a recorded step needs: CUDA has them in bfloat16."""
    return base.device.type != "cuda" or base.dtype == torch.bfloat16


class NewToken(NamedTuple):
    """The newest token of one sequence, the position and slot it belongs to, and whose weights it goes through."""

    token: int
    position: int
    slot: int
    weights: LoraWeights | None


class SlotAttention:
    """Attention of one new token for each sequence over the first C positions of its slot."""

    def __init__(self, cache: KVCache, slots_S: Tensor, positions_S: Tensor, num_positions: int) -> None:
        self._cache = cache
        self._slots_S = slots_S
        self._positions_S = positions_S
        self._keys_C = torch.arange(num_positions, device=cache.device)

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Store the new keys and values and return the attention output.

        Shapes:
            query: (1, G * M, S, E); key, value: (1, G, S, E); returns (1, S, G * M, E).
        """
        key_SGCE, value_SGCE = self._cached(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
        num_rows, num_groups, size = len(self._slots_S), key.shape[1], query.shape[3]
        query_SGME = query[0].transpose(0, 1).reshape(num_rows, num_groups, -1, size).to(key_SGCE.dtype)
        scores_SGMC = query_SGME.matmul(key_SGCE.transpose(2, 3)).float().mul_(scaling)
        if softcap is not None:
            scores_SGMC = scores_SGMC.div_(softcap).tanh_().mul_(softcap)
        scores_SGMC.masked_fill_(~self._allowed(window)[:, None, None, :], float("-inf"))
        output_SGME = torch.softmax(scores_SGMC, dim=-1).to(value_SGCE.dtype).matmul(value_SGCE)
        return output_SGME.reshape(1, num_rows, -1, size).to(query.dtype)

    def _cached(self, layer: int, key_SGE: Tensor, value_SGE: Tensor) -> tuple[Tensor, Tensor]:
        """Store this step's keys and values; return those of all positions, (S, G, C, E) each."""
        chosen = []
        for pool, new_SGE in zip(self._cache.pools(layer, key_SGE), (key_SGE, value_SGE), strict=True):
            pool[self._slots_S, self._positions_S] = new_SGE.to(pool.dtype)
            chosen.append(pool[:, : len(self._keys_C)].index_select(0, self._slots_S).transpose(1, 2))
        return chosen[0], chosen[1]

    def _allowed(self, window: int | None) -> Tensor:
        ends_S1, keys_1C = self._positions_S[:, None], self._keys_C[None]
        seen_SC = keys_1C <= ends_S1
        return seen_SC if window is None else seen_SC & (keys_1C > ends_S1 - window)


class _Step:
    """The fixed buffers of one size of step, and its graph once it is recorded; `rows_3S` holds tokens, positions, slots."""

    def __init__(self, num_rows: int, num_positions: int, bank: AdapterBank, base: BaseModel) -> None:
        self.num_rows = num_rows
        self.num_positions = num_positions
        self.bank = bank
        self.rows_3S = torch.zeros(3, num_rows, dtype=torch.int64, device=base.device)
        self.ends_K = torch.zeros(bank.num_places + 1, dtype=torch.int32, device=base.device)
        self.scaling_S1 = torch.zeros(num_rows, 1, dtype=base.dtype, device=base.device)
        self.num_runs = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits_SV = torch.empty(0)

    def __call__(self, layer: RoutedLinear, inputs: Tensor) -> Tensor:
        """Return a layer's output; inputs: (1, S, D); returns (1, S, F)."""
        output_SF = frozen_linear(inputs[0], layer.weight, layer.bias)
        self.add(output_SF, inputs[0], layer.name)
        return output_SF[None]

    def add(self, output_SF: Tensor, rows_SD: Tensor, name: str) -> None:
        """Add the LoRA products of one module in place."""
        self.bank.add(output_SF, rows_SD, name, ends_K=self.ends_K, scaling_S1=self.scaling_S1)

    def fill(self, rows: Sequence[NewToken], places: Sequence[int]) -> None:
        """Say what the next run is about; copies of the last row fill the buffers up, which writes what it writes."""
        missing = self.num_rows - len(rows)
        rows, places = [*rows, *[rows[-1]] * missing], [*places, *[places[-1]] * missing]
        numbers = [[r.token for r in rows], [r.position for r in rows], [r.slot for r in rows]]
        ends_K = torch.tensor(places).bincount(minlength=len(self.ends_K)).cumsum(0)
        self.rows_3S.copy_(torch.tensor(numbers), non_blocking=True)
        self.ends_K.copy_(ends_K, non_blocking=True)
        scalings = [[self.bank.scaling(place)] for place in places]
        self.scaling_S1.copy_(torch.tensor(scalings), non_blocking=True)


class DecodeGraphs:
    """Runs the decode steps of one base model."""

    def __init__(self, base: BaseModel, head: Head, cache: KVCache) -> None:
        self._base = base
        self._head = head
        self._cache = cache
        self._steps: dict[tuple[int, int], _Step] = {}
        self._cache_version = cache.version
        self._bank: AdapterBank | None = None

    def logits(self, rows: Sequence[NewToken]) -> Tensor:
        """Return the logits (S, V), float32, after the rows, in their order; it is overwritten by the next call."""
        bank = self._fitting_bank({id(row.weights): row.weights for row in rows if row.weights is not None})
        found = bank.places([row.weights for row in rows if row.weights is not None])
        places = [bank.num_places if row.weights is None else found[id(row.weights)] for row in rows]
        order = sorted(range(len(rows)), key=places.__getitem__)
        step = self._step(bank, len(rows), max(row.position for row in rows) + 1)
        step.fill([rows[i] for i in order], [places[i] for i in order])
        logits_SV = self._run(step)[: len(rows)]
        if all(i == j for i, j in enumerate(order)):
            return logits_SV
        back = sorted(range(len(order)), key=order.__getitem__)
        return logits_SV.index_select(0, torch.tensor(back, device=logits_SV.device))

    def release(self) -> None:
        """Let go of the bank, the buffers and what was recorded."""
        self._steps.clear()
        self._bank = None

    def _fitting_bank(self, wanted: dict[int, LoraWeights]) -> AdapterBank:
        """Return a bank for so many adapters of such ranks; what was recorded with a smaller one goes."""
        num_places, rank = max(_MIN_PLACES, len(wanted)), fitting_rank(list(wanted.values()))
        bank = self._bank
        if bank is None or bank.num_places < num_places or bank.rank < rank:
            if bank is not None:
                num_places, rank = max(num_places, bank.num_places), max(rank, bank.rank)
            self.release()
            base = self._base
            bank = self._bank = AdapterBank(
                base.modules,
                num_places=1 << (num_places - 1).bit_length(),
                rank=rank,
                device=base.device,
                dtype=base.dtype,
            )
        return bank

    def _step(self, bank: AdapterBank, num_rows: int, num_positions: int) -> _Step:
        """Return the step of the next power of two of rows and positions."""
        if self._cache.version != self._cache_version:
            self._steps.clear()
            self._cache_version = self._cache.version
        size = 1 << (num_rows - 1).bit_length()
        length = max(_MIN_POSITIONS, 1 << (num_positions - 1).bit_length())
        length = min(length, self._cache.num_positions)
        if (size, length) not in self._steps:
            self._steps[size, length] = _Step(size, length, bank, self._base)
        return self._steps[size, length]

    def _run(self, step: _Step) -> Tensor:
        step.num_runs += 1
        if step.graph is None:
            if self._cache.device.type != "cuda" or step.num_runs <= _RUNS_BEFORE_RECORDING:
                return self._compute(step)
            self._record(step)
        assert step.graph is not None
        step.graph.replay()
        return step.logits_SV

    def _record(self, step: _Step) -> None:
        torch.cuda.synchronize(self._cache.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.logits_SV = self._compute(step)
        step.graph = graph

    def _compute(self, step: _Step) -> Tensor:
        tokens_S, positions_S, slots_S = step.rows_3S
        attend = SlotAttention(self._cache, slots_S, positions_S, step.num_positions)
        with self._base.routed((), attend, sampled=step):
            hidden_SD = self._base.hidden_of(tokens_S, positions_S)
        logits_SV = self._head.base_logits(hidden_SD)
        step.add(logits_SV, hidden_SD, UNEMBED)
        return self._head.cap(logits_SV)
