"""A group whose processes part, or one of whose processes dies, is given up at once."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gpuworker.engine.residency import AdapterMemory
from gpuworker.engine.tensor_parallel import GroupDiffers
from gpuworker.engine.types import LoraSpec
from gpuworker.group import WorkerGroup
from tests.up.instances import all_processes, wait_for

from .jobs import make_job

pytestmark = pytest.mark.skipif(
    torch.accelerator.current_accelerator() is not None, reason="this torch splits over its GPUs only"
)
SOON_S = 10.0


@pytest.fixture
def reasons() -> queue.SimpleQueue[str]:
    """Why the group was given up."""
    return queue.SimpleQueue()


@pytest.fixture
def group(reasons: queue.SimpleQueue[str]) -> Iterator[WorkerGroup]:
    made = WorkerGroup(["cpu", "cpu"], timeout_s=60.0, on_lost=reasons.put)
    yield made
    made.close()


def test_processes_that_differ_are_found_before_a_state_is_kept(
    group: WorkerGroup, reasons: queue.SimpleQueue[str], model_directory: Callable[[str], Path]
) -> None:
    engine = group.load(model_directory("qwen3"), dtype="float32", adapter_memory=AdapterMemory())
    engine.create_adapter("d", LoraSpec(rank=4, seed=1))
    engine.export_state("d", optimizer=True, gradients=False)
    engine._adapters.get("d").master_P[3] += 1e-6
    with pytest.raises(GroupDiffers):
        engine.export_state("d", optimizer=True, gradients=False)
    assert "out of step" in reasons.get(timeout=SOON_S)


def test_a_killed_process_is_noticed_whether_this_one_waits_for_it_or_not(
    group: WorkerGroup, reasons: queue.SimpleQueue[str], model_directory: Callable[[str], Path]
) -> None:
    engine = group.load(model_directory("qwen3"), dtype="float32", adapter_memory=AdapterMemory())
    engine.create_adapter("k", LoraSpec(rank=4, seed=1))
    (pid,) = group.process_ids
    os.kill(pid, signal.SIGKILL)
    assert f"process {pid} of the group ended" in reasons.get(timeout=SOON_S)
    with pytest.raises((RuntimeError, OSError)):
        engine.forward_backward([make_job("k", np.random.default_rng(1), [9])])
    assert reasons.get(timeout=SOON_S)


def test_a_process_that_dies_in_a_pass_does_not_keep_this_one_waiting(
    group: WorkerGroup, reasons: queue.SimpleQueue[str], model_directory: Callable[[str], Path]
) -> None:
    engine = group.load(model_directory("qwen3"), dtype="float32", adapter_memory=AdapterMemory())
    engine.create_adapter("w", LoraSpec(rank=4, seed=1))
    (pid,) = group.process_ids
    os.kill(pid, signal.SIGSTOP)  # so that this process is waiting for it when it dies
    killer = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with pytest.raises((RuntimeError, OSError)):
        engine.forward_backward([make_job("w", np.random.default_rng(1), [9])])
    assert reasons.get(timeout=SOON_S)


def test_the_followers_end_with_a_killed_first_process(model_directory: Callable[[str], Path]) -> None:
    """As after a kill -9 of the worker: nothing tells them but the end of the pipe."""
    code = (
        "import sys\nfrom gpuworker.group import WorkerGroup\n"
        "group = WorkerGroup(['cpu', 'cpu'], timeout_s=60.0, on_lost=print)\n"
        "print(*group.process_ids, flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        follower = int(first.stdout.readline())
        first.kill()
    wait_for(lambda: follower not in all_processes(), SOON_S)
