"""Keys and values of the sequences being sampled, in slots, and attention over them.

One pool per layer holds a row of positions for every slot; pools of another size take over what is in use.
Axes: S slots, C positions of a slot, G key/value heads, H query heads, E head size, T rows, N rows or slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpuworker.engine.attention import attend_causal, attend_masked
from gpuworker.engine.batching import power_of_two
from gpuworker.engine.lora import Scoring

_MIN_POSITIONS = 64


class Entry(NamedTuple):
    """Rows of one sequence in a sampling batch: a whole prompt (start 0) or one new token."""

    slot: int
    start: int
    num_rows: int


class KVCache:
    """The pools of all layers; layers get theirs when they first write.

    `version` changes whenever pools give way to others.
    """

    def __init__(self, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.num_slots = 0
        self.num_positions = 0
        self.version = 0
        self._pools: dict[int, tuple[Tensor, Tensor]] = {}

    def num_fitting(self, num_positions: int) -> int:
        """Return how many slots there are for sequences of so many positions."""
        return self.num_slots if num_positions <= self.num_positions else 0

    def size_for(self, num_slots: int, num_positions: int, *, max_positions: int) -> tuple[int, int]:
        """Return slots and positions of pools for so much, or for as many slots as there is room for, at least one.

        Both are powers of two as far as there is room, to move pools less often. Slots get shorter, and no longer
        than needed, only where not all have room otherwise.

        Args:
            max_positions: what all slots together may have.
        """
        needed = max(_MIN_POSITIONS, power_of_two(num_positions))
        shortest = -(-num_positions // _MIN_POSITIONS) * _MIN_POSITIONS
        for length in (max(needed, self.num_positions), needed, shortest):
            slots = min(power_of_two(num_slots), max_positions // length)
            if slots >= num_slots:
                return slots, length
        return max(slots, 1), shortest

    def resize(self, num_slots: int, num_positions: int, *, kept: Sequence[int]) -> None:
        """Replace the pools by others, in which the slots that are kept come first, in this order.

        Where memory runs out everything stays as it was: for a while there are both, the old pools and the new.
        """
        index_N = torch.tensor(kept, dtype=torch.int64, device=self.device)
        pools = {
            layer: (
                _moved(keys, index_N, num_slots, num_positions),
                _moved(values, index_N, num_slots, num_positions),
            )
            for layer, (keys, values) in self._pools.items()
        }
        self._pools, self.num_slots, self.num_positions = pools, num_slots, num_positions
        self.version += 1

    def release(self) -> None:
        """Give all memory back; only while no slot is in use."""
        self.num_slots = self.num_positions = 0
        self.version += 1
        self._pools.clear()

    def clear(self, slots: Sequence[int]) -> None:
        """Overwrite slots that may hold NaN, which would pass through a mask."""
        for pool in (pool for pools in self._pools.values() for pool in pools):
            pool[list(slots)] = 0

    def copy(self, source: int, targets: Sequence[int], num_positions: int) -> None:
        """Copy the first positions of one slot to others, in every layer."""
        targets_N = torch.tensor(targets, device=self.device)
        for pool in (pool for pools in self._pools.values() for pool in pools):
            pool[targets_N, :num_positions] = pool[source, :num_positions].clone()  # may be all of the pool

    def pools(self, layer: int, like_TGE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the key and value pools (S, C, G, E) of one layer."""
        if layer not in self._pools:
            shape = (self.num_slots, self.num_positions, *like_TGE.shape[1:])
            # Zeros, not empty: masked positions are multiplied by 0 and must not hold NaN.
            self._pools[layer] = (
                torch.zeros(shape, device=self.device, dtype=self.dtype),
                torch.zeros(shape, device=self.device, dtype=self.dtype),
            )
        return self._pools[layer]


def _moved(pool: Tensor, kept_N: Tensor, num_slots: int, num_positions: int) -> Tensor:
    """Return a pool that begins with some slots of another, as far as it has positions for them."""
    moved = pool.new_zeros(num_slots, num_positions, *pool.shape[2:])
    length = min(num_positions, pool.shape[1])
    moved[: len(kept_N), :length] = pool[:, :length].index_select(0, kept_N)
    return moved


class CachedAttention:
    """Attention of one sampling batch: prompts attend to themselves, new tokens to their slot.

    On a CPU each sequence reads just its own positions in place, so its bits do not depend on the
    others. Elsewhere (`grouped`) all new tokens go through one masked call per layer.
    """

    def __init__(self, cache: KVCache, entries: Sequence[Entry], num_rows: int, *, grouped: bool) -> None:
        self._cache = cache
        self._entries = entries
        counts = [entry.num_rows for entry in entries]
        self._num_rows = sum(counts)
        self._counts = [*counts, num_rows - self._num_rows]
        firsts = [entry.slot * cache.num_positions + entry.start for entry in entries]
        places = [first + i for first, count in zip(firsts, counts, strict=True) for i in range(count)]
        self._places = torch.tensor(places, device=cache.device)
        self._grouped = self._plan_group() if grouped else None

    def _plan_group(self) -> _Group | None:
        rows, slots, lengths, row = [], [], [], 0
        for entry in self._entries:
            if entry.start > 0:
                rows.append(row)
                slots.append(entry.slot)
                lengths.append(entry.start + 1)
            row += entry.num_rows
        if not rows:
            return None
        device = self._cache.device
        positions = torch.arange(max(lengths), device=device)
        ends = torch.tensor(lengths, device=device)[:, None]
        return _Group(torch.tensor(rows, device=device), torch.tensor(slots, device=device), positions, ends)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Store the new keys and values and return the attention output.

        Shapes:
            query: (1, H, T, E); key, value: (1, G, T, E); returns (1, T, H, E).
        """
        dtype = query.dtype
        query, key, value = (part.to(self._cache.dtype) for part in (query, key, value))
        pools = self._store(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
        keys, values = (pool.transpose(1, 2) for pool in pools)
        *parts, padding = torch.split(query, self._counts, dim=2)
        outputs, row = [], 0
        for (slot, start, count), rows in zip(self._entries, parts, strict=True):
            if start == 0:
                k, v = key[:, :, row : row + count], value[:, :, row : row + count]
            else:
                k, v = keys[slot : slot + 1, :, : start + 1], values[slot : slot + 1, :, : start + 1]
            row += count
            if start > 0 and self._grouped is not None:
                outputs.append(rows)  # replaced below
            else:
                outputs.append(attend_causal(rows, k, v, scoring))
        # Any finite numbers do for the rows of padding, which nobody reads.
        output = torch.cat([part.transpose(1, 2) for part in (*outputs, padding)], dim=1)
        if self._grouped is not None:
            output[0, self._grouped.rows] = self._grouped.attend(query, keys, values, scoring)
        return output.to(dtype)

    def _store(self, layer: int, key_TGE: Tensor, value_TGE: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values to their positions and return the layer's pools."""
        pools = self._cache.pools(layer, key_TGE)
        for pool, new_TGE in zip(pools, (key_TGE, value_TGE), strict=True):
            pool.flatten(0, 1).index_copy_(0, self._places, new_TGE[: self._num_rows])
        return pools


class _Group(NamedTuple):
    """The new tokens of a batch: their rows, slots, key positions (L,) and lengths (N, 1)."""

    rows: Tensor
    slots: Tensor
    positions: Tensor
    ends: Tensor

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
        """Return the output of all new tokens, (N, H, E), over copies of their slots."""
        allowed = self.positions[None, :] < self.ends
        if scoring.window is not None:
            allowed &= self.positions[None, :] >= self.ends - scoring.window
        allowed = allowed[:, None, None, :]
        query_NHE = query[0, :, self.rows].transpose(0, 1)[:, :, None]
        key = keys[self.slots, :, : len(self.positions)]
        value = values[self.slots, :, : len(self.positions)]
        return attend_masked(query_NHE, key, value, allowed, scoring)[:, :, 0]
