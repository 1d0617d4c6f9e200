"""What a killed worker leaves in the temporary folder goes; what others have there stays."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gpuworker import scratch

MAKE = "import tempfile; from gpuworker import scratch; print(tempfile.mkdtemp(prefix=scratch.prefix()))"


def test_folders_of_processes_that_are_no_more_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    made = subprocess.run([sys.executable, "-c", MAKE], capture_output=True, text=True, check=True)
    left = Path(made.stdout.strip())
    (left / "adapter.safetensors").touch()
    own = Path(tempfile.mkdtemp(prefix=scratch.prefix()))
    strange = tmp_path / "mintweb-worker-x"
    strange.mkdir()
    (tmp_path / left.name.replace("-worker-", "-worker-0")).symlink_to(strange)
    scratch.remove_left()
    assert not left.exists()
    assert own.is_dir()
    assert strange.is_dir()
