"""Telling a lack of memory from other runtime errors of torch."""

from __future__ import annotations

import torch

_HOST_MARKS = ("DefaultCPUAllocator", "not enough memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch raised the error because the device or the host had no room."""
    return isinstance(error, torch.OutOfMemoryError) or any(mark in str(error) for mark in _HOST_MARKS)
