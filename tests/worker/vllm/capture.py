"""Captures what a real vLLM server answers, for the tests that have none: `python -m tests.worker.vllm.capture`.

Needs the environment of `make vllm-env`. Writes `wire/*.json`: each request as it is sent, with its answer.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import httpx

from gpuworker import vllm_client, vllm_wire
from gpuworker.engine import checkpoints
from gpuworker.engine.engine import Engine
from gpuworker.engine.types import SampleRequest
from tests.worker.vllm import cases
from tests.worker.vllm.process import VllmProcess
from tests.worker.vllm.replay import EXCHANGES


def main() -> None:
    """Capture everything anew."""
    engine = cases.load_engine()
    EXCHANGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        state = cases.adapter_state(engine)
        checkpoints.write(state, folder / "adapter", base_model=cases.MODEL)
        engine.load_sampler(cases.ADAPTER, state)
        server = VllmProcess(folder / "log")
        try:
            with httpx.Client(base_url=server.url, timeout=300, trust_env=False) as client:
                _capture(client, engine, folder / "adapter")
        finally:
            server.kill()


def _capture(client: httpx.Client, engine: Engine, adapter: Path) -> None:
    for name, path in (("models", "/v1/models"), ("version", "/version")):
        answer = client.get(path).json()
        for card in answer.get("data", ()):
            card["root"] = cases.MODEL  # in the place of this machine's folder
        _write(name, {"path": path, "answer": answer})
    body = {"lora_name": cases.ADAPTER, "lora_path": str(adapter)}
    client.post("/v1/load_lora_adapter", json=body).raise_for_status()
    probe = vllm_client.served_model(cases.MODEL, "", engine).probe
    for one in (*cases.all_of(engine), probe):
        _ask(client, engine, one, name=one.request_id)
    for name in ("greedy", "greedy_adapter"):
        _ask(client, engine, cases.by_name(engine)[name], name=f"{name}_streamed", is_streamed=True)


def _ask(
    client: httpx.Client, engine: Engine, one: SampleRequest, *, name: str, is_streamed: bool = False
) -> None:
    request = vllm_wire.completion_body(
        one,
        model=one.sampler_id or cases.MODEL,
        max_new=min(one.params.max_tokens, engine.max_context - len(one.prompt)),
        end_tokens=engine.end_tokens,
        is_streamed=is_streamed,
    )
    answer = client.post("/v1/completions", json=request)
    content = answer.text if is_streamed else answer.json()
    _write(name, {"request": request, "status": answer.status_code, "answer": content})


def _write(name: str, exchange: dict[str, Any]) -> None:
    (EXCHANGES / f"{name}.json").write_text(json.dumps(exchange) + "\n")


if __name__ == "__main__":
    main()
