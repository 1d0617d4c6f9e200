"""Compares samples by the engine with samples by a vLLM server of the same base model: `python -m bench.vllm_compare --help`.

Start the server first, as `docs/operations.md` has it. Both draw the same requests one after the other, from random
weights of one adapter or from the bare model; prints tokens per second and how far the log-probabilities are apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gpuworker.engine import checkpoints
from gpuworker.engine.engine import Engine
from gpuworker.engine.sampling import Sampler
from gpuworker.engine.types import LoraSpec, SampleRequest, SampleResult, SamplingParams
from gpuworker.vllm_adapters import Folders
from gpuworker.vllm_client import served_model
from gpuworker.vllm_sampler import VllmSampler

_ADAPTER = "bench/vllm-compare"
_ATTACH_S = 300.0


def main() -> None:
    """Print one line of JSON."""
    options = _options()
    engine = Engine.load(options.folder, device=options.device, dtype=options.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        if options.rank:
            _make_adapter(engine, options, Path(temporary) / _ADAPTER)
        with _server(engine, options, Path(temporary)) as server:
            requests = _requests(engine, options)
            rows = {}
            for name, sampler in (("engine", engine.sampler), ("vllm", server)):
                _draw(sampler, [replace(one, request_id=f"warm-{one.request_id}") for one in requests])
                started_at = time.perf_counter()
                results = _draw(sampler, requests)
                rows[name] = _num_tokens(results) / (time.perf_counter() - started_at)
            difference = _difference(engine, server, requests[0])
    print(json.dumps({"tokens_per_s": rows, "largest_logprob_difference": difference, "words": server.words}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the base model's folder")
    parser.add_argument("name", help="the name that the server has for it")
    parser.add_argument("url", help="the server, http://host:port")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter; 0: sample the bare model")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1, help="of each request")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=256, help="of each sample")
    return parser.parse_args()


def _make_adapter(engine: Engine, options: argparse.Namespace, folder: Path) -> None:
    engine.create_adapter(_ADAPTER, LoraSpec(rank=options.rank, seed=1))
    state = engine.export_state(_ADAPTER, optimizer=False, gradients=False)
    generator = torch.Generator().manual_seed(1)
    state = replace(state, weights=torch.randn(state.weights.shape, generator=generator) * 0.01)
    engine.drop_adapter(_ADAPTER)
    engine.load_sampler(_ADAPTER, state)
    checkpoints.write(state, folder, base_model=options.name)


@contextmanager
def _server(engine: Engine, options: argparse.Namespace, root: Path) -> Iterator[VllmSampler]:
    folders = Folders(lend=lambda sampler_id: root / sampler_id, take_back=lambda sampler_id: None)
    model = served_model(options.name, str(options.folder), engine)
    server = VllmSampler(
        options.url, model, folders, on_ended=lambda: None, api_key="", look_s=5.0, silence_s=10.0
    )
    try:
        until = time.monotonic() + _ATTACH_S
        while "by vLLM" not in server.words:
            if time.monotonic() > until:
                raise SystemExit(server.words)
            time.sleep(0.05)
        yield server
    finally:
        server.stop()


def _requests(engine: Engine, options: argparse.Namespace) -> list[SampleRequest]:
    random = np.random.default_rng(0)
    params = SamplingParams(max_tokens=options.tokens, seed=0, temperature=1.0, stop_tokens=())
    return [
        SampleRequest(
            request_id=str(number),
            sampler_id=_ADAPTER if options.rank else None,
            prompt=random.integers(0, engine.vocab_size // 2, options.prompt),
            params=replace(params, seed=number),
            num_samples=options.samples,
        )
        for number in range(options.requests)
    ]


def _draw(sampler: Sampler | VllmSampler, requests: list[SampleRequest]) -> list[SampleResult]:
    submit: Callable[[SampleRequest], None] = (
        sampler.submit if isinstance(sampler, Sampler) else lambda one: sampler.submit(one, is_watched=False)
    )
    for one in requests:
        submit(one)
    results: list[SampleResult] = []
    while len(results) < len(requests):
        for _, outcome in sampler.step():
            if not isinstance(outcome, SampleResult):
                raise outcome
            results.append(outcome)
        if not isinstance(sampler, Sampler):
            time.sleep(0.001)
    return results


def _num_tokens(results: list[SampleResult]) -> int:
    return sum(len(sequence.tokens) for result in results for sequence in result.sequences)


def _difference(engine: Engine, server: VllmSampler, like: SampleRequest) -> float:
    """Return how far the two are apart over one prompt."""
    params = SamplingParams(max_tokens=1, seed=0, temperature=0.0, stop_tokens=())
    one = replace(like, request_id="scores", params=params, num_samples=1, prompt_logprobs=True)
    scores = [_draw(sampler, [one])[0].prompt_logprobs for sampler in (engine.sampler, server)]
    assert scores[0] is not None
    assert scores[1] is not None
    return float(np.nanmax(np.abs(scores[0] - scores[1])))


if __name__ == "__main__":
    main()
