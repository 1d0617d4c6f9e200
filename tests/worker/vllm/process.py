"""A real vLLM server, on CPUs, where an environment with vLLM is there (`make vllm-env`)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import httpx

from tests.up.instances import free_port
from tests.worker.vllm import cases

ROOT = Path(__file__).resolve().parents[3]
START_S = 300.0


def program() -> Path:
    """Return where the Python that has vLLM would be."""
    return Path(os.environ.get("VLLM_ENV", ROOT / ".venv-vllm")).absolute() / "bin" / "python"


class VllmProcess:
    """Serves the shipped model in float32."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._arguments = arguments
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # What `vllm serve` does; the command itself does not start in builds under another name.
        command = [
            str(program()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(cases.DIRECTORY),
            "--served-model-name", cases.MODEL, "--host", "127.0.0.1", "--port", str(self.port),
            "--dtype", "float32", "--enforce-eager", "--enable-lora", "--max-lora-rank", "16",
            "--max-loras", "4", "--max-cpu-loras", "8", "--max-num-seqs", "16", *self._arguments,
        ]  # fmt: skip
        env = {
            **{
                key: value for key, value in os.environ.items() if not key.startswith(("MINTWEB_", "DJANGO_"))
            },
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=env, stdout=output, stderr=output, start_new_session=True
            )
        until = time.monotonic() + START_S
        while not self._answers():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < until, self.log.read_text()[-4000:]
            time.sleep(0.2)

    def num_running(self) -> int:
        """Return how many requests it is at."""
        return self._metric("vllm:num_requests_running")

    def num_done(self) -> int:
        """Return how many requests it has answered."""
        return self._metric("vllm:request_success_total")

    def _metric(self, name: str) -> int:
        metrics = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text
        lines = [line for line in metrics.splitlines() if line.startswith(name + "{")]
        return int(sum(float(line.rpartition(" ")[2]) for line in lines))

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End it at once."""
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False
