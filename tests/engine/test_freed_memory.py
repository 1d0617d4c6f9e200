"""What a CPU process freed is there for its next tensors, and goes back to the system when it is asked for."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NUM_PAGES = 4 * (64 << 20) // resource.getpagesize()

# 64 MB a time, which glibc would fetch anew each time; then what is kept, before and after it is returned.
PROGRAM = """
import resource, sys
from pathlib import Path
import torch
from gpuworker.engine import memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

if sys.argv[1] == "kept":
    memory.keep_freed(torch.device("cpu"))
for _ in range(8):
    torch.ones(16 << 20)
before = faults()
for _ in range(4):
    torch.ones(16 << 20)
kept_mib = resident_mib()
memory.return_freed()
print(faults() - before, kept_mib - resident_mib())
"""


def run(way: str, **env: str) -> tuple[int, int]:
    """Return page faults of four tensors of 64 MB, and the MiB that went back afterwards."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, way], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    faults, returned_mib = process.stdout.split()
    return int(faults), int(returned_mib)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_used_again_and_can_be_returned() -> None:
    faults, returned_mib = run("kept")
    assert faults <= NUM_PAGES / 2
    assert returned_mib >= 60
    faults, _ = run("as it is")
    assert faults >= NUM_PAGES, "the test shows nothing here"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_settings_of_the_operator_stay() -> None:
    faults, _ = run("kept", MALLOC_MMAP_THRESHOLD_="1048576")
    assert faults >= NUM_PAGES
