"""The peak of memory during a call: of the device's allocator, or of this process as Linux counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from bench.timing import free, synchronize

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return how far memory rises during a call above where it was before.

    On a GPU it is what torch holds, graphs' own memory included. On a CPU memory that earlier calls freed but the C library kept is not seen again, so the
    figure is a lower bound there.
    """
    free(device)
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        run()
        synchronize(device)
        return int(torch.cuda.max_memory_reserved(device) - before)
    _CLEAR.write_text(_RESET_PEAK)
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {name}")
