"""How much memory there is, telling a lack of it from other runtime errors of torch, and making room."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CONTAINER_USE = Path("/sys/fs/cgroup/memory.current")
_CONTAINER_PARTS = Path("/sys/fs/cgroup/memory.stat")
_CACHED_FILES = ("inactive_file", "active_file")
_SYSTEM_MEMORY = Path("/proc/meminfo")
_HOST_MARKS = ("DefaultCPUAllocator", "not enough memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch raised the error because the device or the host had no room."""
    return isinstance(error, torch.OutOfMemoryError) or any(mark in str(error) for mark in _HOST_MARKS)


def free_cache(device: torch.device) -> None:
    """Give memory that torch keeps for later back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def total_bytes(device: torch.device) -> int:
    """Return the memory of a device; of the host it is what a container's limit leaves of it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(installed, int(_CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return installed


def free_bytes(device: torch.device) -> int:
    """Return the memory of a GPU that nobody uses."""
    return int(torch.cuda.mem_get_info(device)[0])


def available_bytes() -> int:
    """Return the host's memory that a process could still take; half of all where the system does not tell."""
    total = total_bytes(torch.device("cpu"))
    try:
        lines = dict(line.split(":", 1) for line in _SYSTEM_MEMORY.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return total // 2
    try:
        return min(available, total - int(_CONTAINER_USE.read_text()) + _cached_bytes())
    except (OSError, ValueError):
        return min(available, total)


def _cached_bytes() -> int:
    """Return what a container's use counts of files that were read: the system takes it back for whoever needs it."""
    parts = dict(line.split() for line in _CONTAINER_PARTS.read_text().splitlines())
    return sum(int(parts.get(name, 0)) for name in _CACHED_FILES)
