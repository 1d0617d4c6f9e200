"""Which adapters lie on the device, and which rest in host memory until they are used again.

Where device and host are one memory nothing moves. Moving changes no bit. What has no room in host memory
either is for the worker to keep on the disk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from gpuworker.engine.adapters import Adapter
from gpuworker.engine.exceptions import AdapterNotLoaded, OutOfMemory
from gpuworker.engine.memory import available_bytes, free_bytes, is_out_of_memory, total_bytes

_HOST = torch.device("cpu")
# Where nearly nothing is free at the moment of the look, adapters still get this part of all: 5 %.
_SMALLEST_PART = 20


@dataclass(frozen=True, kw_only=True)
class AdapterMemory:
    """How much memory adapters and sampler weights may take.

    0 bytes stand for a part of what is free when the base model is loaded: a sixth of a GPU's memory, the
    rest being for activations and caches, and half of the host's; at least 5 % of all.

    Args:
        num_engines: base models of one worker, which share the device.
        num_workers: workers of one host, which share its memory.
    """

    device_bytes: int = 0
    host_bytes: int = 0
    num_engines: int = 1
    num_workers: int = 1

    def resolved(self, device: torch.device) -> AdapterMemory:
        """Return the same with figures for the zeros; without a GPU there is host memory only."""
        half = max(available_bytes() // 2, total_bytes(_HOST) // _SMALLEST_PART)
        host_bytes = self.host_bytes or half // self.num_engines // self.num_workers
        if device.type != "cuda":
            return AdapterMemory(device_bytes=self.device_bytes or host_bytes)
        sixth = max(free_bytes(device) // 6, total_bytes(device) // _SMALLEST_PART)
        device_bytes = self.device_bytes or sixth // self.num_engines
        return AdapterMemory(device_bytes=device_bytes, host_bytes=host_bytes)

    def agreed(self, least: Callable[[int], int]) -> AdapterMemory:
        """Return the room that each process of a group has: all must move the same adapters."""
        return replace(self, device_bytes=least(self.device_bytes), host_bytes=least(self.host_bytes))

    @property
    def total_bytes(self) -> int:
        """Return what fits on the device and the host together."""
        return self.device_bytes + self.host_bytes


class Residency:
    """The adapters of one engine, the least recently used first.

    Args:
        device_bytes: room on the device; a single adapter may exceed it.
    """

    def __init__(self, device: torch.device, *, device_bytes: int) -> None:
        self._device = device
        self._device_bytes = device_bytes
        self._held: OrderedDict[str, Adapter] = OrderedDict()
        self.reserved_bytes = 0

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._held

    def get(self, adapter_id: str) -> Adapter:
        """Return an adapter wherever it lies.

        Raises:
            AdapterNotLoaded: the adapter is not held.
        """
        if adapter_id not in self._held:
            raise AdapterNotLoaded(f"adapter {adapter_id} is not loaded")
        return self._held[adapter_id]

    def put(self, adapter_id: str, adapter: Adapter) -> None:
        """Hold an adapter, in the place of one with the same id."""
        self._held[adapter_id] = adapter
        self._held.move_to_end(adapter_id)

    def drop(self, adapter_id: str) -> None:
        """Forget an adapter; unknown ids are fine."""
        self._held.pop(adapter_id, None)

    def bring(self, adapter_ids: Collection[str]) -> dict[str, OutOfMemory]:
        """Have these adapters on the device, and count them as used now; unknown ids are passed over.

        Returns:
            Those that stay where they are, because memory ran out.
        """
        known = [adapter_id for adapter_id in dict.fromkeys(adapter_ids) if adapter_id in self._held]
        for adapter_id in known:
            self._held.move_to_end(adapter_id)
        refused: dict[str, OutOfMemory] = {}
        for adapter_id in known:
            if self._is_here(adapter_id):
                continue
            try:
                self.make_room(self._bytes_of([adapter_id]), keeping=set(known))
                self._held[adapter_id].move(self._device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                refused[adapter_id] = OutOfMemory(f"no room for the adapter: {error}")
        return refused

    def make_room(self, num_bytes: int, *, keeping: Collection[str] = ()) -> None:
        """Move the least recently used adapters to the host until so many bytes fit on the device."""
        if self._device.type == _HOST.type:
            return
        here = [adapter_id for adapter_id in self._held if self._is_here(adapter_id)]
        excess = self.reserved_bytes + self._bytes_of(here) + num_bytes - self._device_bytes
        for adapter_id in here:
            if excess <= 0:
                return
            if adapter_id not in keeping:
                self._held[adapter_id].move(_HOST)
                excess -= self._held[adapter_id].num_bytes

    def fitting(self, adapter_ids: Sequence[str]) -> Iterator[slice]:
        """Yield the longest stretches of a list whose adapters fit on the device together."""
        room = self._device_bytes - self.reserved_bytes
        start, num_bytes, chosen = 0, 0, set[str]()
        for position, adapter_id in enumerate(adapter_ids):
            added = 0 if adapter_id in chosen else self._bytes_of([adapter_id])
            if num_bytes and num_bytes + added > room and self._device.type != _HOST.type:
                yield slice(start, position)
                start, num_bytes, chosen = position, 0, set()
                added = self._bytes_of([adapter_id])
            num_bytes += added
            chosen.add(adapter_id)
        if adapter_ids:
            yield slice(start, len(adapter_ids))

    def _is_here(self, adapter_id: str) -> bool:
        return self._held[adapter_id].device.type == self._device.type

    def _bytes_of(self, adapter_ids: Collection[str]) -> int:
        return sum(self._held[one].num_bytes for one in adapter_ids if one in self._held)
