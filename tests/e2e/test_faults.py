"""Faults under an unmodified client: the loss curve is that of the undisturbed run, and nobody sees an exception."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import MINT022
from tests.up.instances import Instance

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
LOOP = Path(__file__).with_name("fault_loop.py")


def kill_gpu_worker(product: Instance) -> None:
    for pid in product.processes("queues=gpu"):
        os.kill(pid, signal.SIGKILL)


def kill_web(product: Instance) -> None:
    for pid in product.processes("uvicorn"):
        os.kill(pid, signal.SIGKILL)


def kill_redis(product: Instance) -> None:
    for pid in product.processes("redis"):
        os.kill(pid, signal.SIGKILL)


def kill_postgres(product: Instance) -> None:
    """Kill the server process; its children notice and the next start recovers from the log."""
    for pid in product.processes("postgres"):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("fault", [kill_gpu_worker, kill_web, kill_redis, kill_postgres])
def test_a_client_only_waits(
    fault: Callable[[Instance], None], product: Instance, sdk_env: dict[str, str], tmp_path: Path
) -> None:
    undisturbed = MINT022.run(LOOP, env=sdk_env)
    assert undisturbed.returncode == 0, undisturbed.stderr

    process_env = {**sdk_env, "SIGNAL_FILE": str(tmp_path / "half-way")}
    disturbed = _run_with_fault(lambda: fault(product), process_env, tmp_path / "half-way")
    assert disturbed == undisturbed.stdout


def _run_with_fault(fault: Callable[[], None], env: dict[str, str], half_way: Path) -> str:
    import subprocess

    from tests.up.instances import wait_for

    process = subprocess.Popen(
        [str(MINT022.python), str(LOOP)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: half_way.exists() or process.poll() is not None, 120)
    fault()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out
