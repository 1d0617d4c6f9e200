"""What a state or an answer was computed with: the engine's own fingerprint, and which code that engine is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from gpuworker import engine as engine_package
from gpuworker.engine.engine import Engine


def _digest() -> str:
    """Return a digest of the engine's sources: after an update its results may have other last bits."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(engine_package.__file__)).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


# Read once: what runs is what was imported, whatever happens to the files later.
_CODE: Final = _digest()


def fingerprint_of(engine: Engine) -> dict[str, str]:
    """Return what must be the same for a replay to give the same bits."""
    return {**engine.fingerprint, "code": _CODE}
