"""How much memory there is, telling a lack of it from other runtime errors of torch, and making room."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import torch
import torch.distributed as dist

from gpuworker.engine.exceptions import OutOfMemory

Made = TypeVar("Made")

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CONTAINER_USE = Path("/sys/fs/cgroup/memory.current")
_CONTAINER_PARTS = Path("/sys/fs/cgroup/memory.stat")
_CACHED_FILES = ("inactive_file", "active_file")
_SYSTEM_MEMORY = Path("/proc/meminfo")
_HOST_MARKS = ("DefaultCPUAllocator", "not enough memory")

# glibc's malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_ALLOCATOR_SETTINGS: Final = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_KEPT_BYTES: Final = 1 << 30


def is_out_of_memory(error: Exception) -> bool:
    """Return whether torch raised the error because the device or the host had no room, and it can be tried otherwise.

    In a group it cannot: the other processes may have had room, and go on in step with this one.
    """
    if dist.is_available() and dist.is_initialized():
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(mark in str(error) for mark in _HOST_MARKS)


def is_device_lost(error: Exception) -> bool:
    """Return whether the error says that the device takes no further work from this process, whatever it is.

    A fault in one kernel ends the context, and every later call fails with it.
    """
    if not isinstance(error, RuntimeError) or "out of memory" in str(error):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def with_room(action: Callable[[], Made], *, free: Callable[[], None], what: str) -> Made:
    """Return what an action makes; where memory runs out it is tried once more after `free`.

    The action must leave nothing half done when an allocation fails.

    Raises:
        OutOfMemory: there is no room even then.
    """
    try:
        return action()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free()
    try:
        return action()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"no room for {what}: {error}") from error


def keep_freed(device: torch.device) -> None:
    """Let a process that computes on a CPU keep up to a GiB that it freed for its next tensors.

    By default glibc returns what is large at once, and the system clears each page that it hands out again: with
    a vocabulary of 150,000 that was up to two fifths of a training step. Settings in the environment stay.

    Source: mallopt(3); other C libraries have no such function.
    """
    mallopt = getattr(_c_library(), "mallopt", None)
    if device.type == "cpu" and mallopt is not None and not any(map(os.environ.get, _ALLOCATOR_SETTINGS)):
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed() -> None:
    """Return the host's memory that the process freed and keeps to the system."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_cache(device: torch.device) -> None:
    """Give memory that is kept for later back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        return_freed()


def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if os.name == "posix" else None


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
