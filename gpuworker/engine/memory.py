"""How much memory there is, telling a lack of it from other runtime errors of torch, and making room."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
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
