"""Names that the SDK tests and their fixtures share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RunClient = Callable[..., subprocess.CompletedProcess[str]]
