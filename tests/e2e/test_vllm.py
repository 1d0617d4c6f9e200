"""An unmodified client over a real vLLM server that dies over its samples and comes back: it notices nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import MINT022
from tests.e2e.disturbed import rows
from tests.up.instances import Instance, wait_for
from tests.worker.vllm.process import VllmProcess, program

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not program().is_file(), reason="needs an environment with vLLM: make vllm-env"),
]
LOOP = Path(__file__).with_name("vllm_loop.py")
PATIENCE_S = 120


@pytest.fixture
def server(tmp_path: Path) -> Iterator[VllmProcess]:
    process = VllmProcess(tmp_path / "vllm.log")
    yield process
    process.kill()


@pytest.fixture
def product(tmp_path: Path, server: VllmProcess) -> Iterator[Instance]:
    instance = Instance(tmp_path / "data", MINTWEB_VLLM=f"mintweb/tiny={server.url}", MINTWEB_DTYPE="float32")
    instance.start()
    yield instance
    assert instance.stop() == 0


@pytest.fixture
def client(product: Instance, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    exports = dict(re.findall(r"((?:MINT|TINKER)_[A-Z_]+)=(\S+)", product.output))
    env = {**os.environ, **exports, "HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"}
    with (tmp_path / "client.log").open("w") as errors:
        process = subprocess.Popen(
            [str(MINT022.python), str(LOOP)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    with process:  # closes its pipes, at which it ends
        yield process
    assert process.returncode == 0, (tmp_path / "client.log").read_text()


def order(client: subprocess.Popen[str], what: str) -> dict[str, Any]:
    assert client.stdin is not None
    client.stdin.write(f"{what}\n")
    client.stdin.flush()
    return read(client)


def read(client: subprocess.Popen[str]) -> dict[str, Any]:
    assert client.stdout is not None
    answer: dict[str, Any] = json.loads(client.stdout.readline())
    return answer


def words(product: Instance) -> str:
    ((samplers,),) = rows(product, "SELECT samplers FROM runs_worker WHERE stopped_at IS NULL")
    return str(samplers.get("mintweb/tiny", ""))


def wait_for_words(product: Instance, text: str) -> None:
    wait_for(lambda: text in words(product), PATIENCE_S, product.describe)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["tokens"] == other["tokens"]
    np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=1e-3)
    np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-3)


def test_a_client_notices_nothing_of_the_server(
    product: Instance, server: VllmProcess, client: subprocess.Popen[str]
) -> None:
    wait_for_words(product, "samples by vLLM")
    before = server.num_done()
    by_server = order(client, "greedy")
    assert server.num_done() == before + 2
    assert order(client, "many") == {}
    wait_for(lambda: server.num_running() > 0, PATIENCE_S, product.describe)
    server.kill()
    assert read(client) == {"lengths": [1200] * 8}
    wait_for_words(product, "samples by the engine")
    assert_same(order(client, "greedy"), by_server)
    server.start()
    wait_for_words(product, "samples by vLLM")
    before = server.num_done()
    assert_same(order(client, "greedy"), by_server)
    assert server.num_done() == before + 2
