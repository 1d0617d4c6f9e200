"""What a device is called: a part of the fingerprint that says whose bits a replay would repeat."""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()


@cache
def _processor_name() -> str:
    """Return which processor this is: two kinds of equal abilities may give other last bits."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
