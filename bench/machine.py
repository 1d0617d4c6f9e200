"""What figures depend on: the machine."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Return the processor's name with family and model, which tell virtual ones apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return platform.processor()
    names = {
        key.strip(): value.strip() for key, value in (line.split(":", 1) for line in lines if ":" in line)
    }
    name = names.get("model name", platform.processor())
    return f"{name} (family {names.get('cpu family')}, model {names.get('model')})"
