"""The requests that are made of a vLLM server, a captured one and a real one, and of the engine beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gpuworker.engine.adapters import AdapterState
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import EngineError
from gpuworker.engine.types import LoraSpec, SampleRequest, SampleResult, SamplingParams

MODEL = "mintweb/tiny"
DIRECTORY = Path(__file__).resolve().parents[3] / "gpuworker" / "tiny" / "model"
ADAPTER = "checkpoints/adapter"
SPEC = LoraSpec(rank=8, seed=3, train_unembed=False)
# A prompt and another one, in tokens of the shipped model.
PROMPT = (410, 263, 611, 11, 266, 309, 278, 265)
OTHER = (64, 272, 301, 280, 269, 12, 330, 270, 265, 277)
GREEDY = SamplingParams(max_tokens=24, seed=0, temperature=0.0, stop_tokens=())
WARM = SamplingParams(max_tokens=12, seed=7, temperature=0.9, top_k=50, top_p=0.95, stop_tokens=())


def load_engine() -> Engine:
    """Return the shipped model in float32."""
    return Engine.load(DIRECTORY, device="cpu", dtype="float32")


def adapter_state(engine: Engine, spec: LoraSpec = SPEC) -> AdapterState:
    """Return random weights that change what the model says."""
    engine.create_adapter("made", spec)
    state = engine.export_state("made", optimizer=False, gradients=False)
    engine.drop_adapter("made")
    generator = torch.Generator().manual_seed(spec.seed)
    return replace(state, weights=torch.randn(state.weights.shape, generator=generator) * 0.05)


def request(
    name: str,
    params: SamplingParams = GREEDY,
    *,
    prompt: tuple[int, ...] = PROMPT,
    adapter: str | None = None,
    num_samples: int = 1,
    prompt_logprobs: bool = False,
    topk: int = 0,
) -> SampleRequest:
    """Return one request."""
    return SampleRequest(
        request_id=name,
        sampler_id=adapter,
        prompt=np.array(prompt, dtype=np.int64),
        params=params,
        num_samples=num_samples,
        prompt_logprobs=prompt_logprobs,
        topk_prompt_logprobs=topk,
    )


def all_of(engine: Engine) -> list[SampleRequest]:
    """Return requests of every kind; stops are those that the engine comes across."""
    greedy = draw(engine, request("first")).sequences[0].tokens
    stop_token = replace(GREEDY, stop_tokens=(int(greedy[9]),))
    return [
        request("greedy"),
        request("greedy_twice", num_samples=2),
        request("greedy_adapter", adapter=ADAPTER),
        request("warm", WARM, num_samples=3),
        request("warm_adapter", WARM, adapter=ADAPTER, num_samples=2),
        request("prompt_logprobs", replace(GREEDY, max_tokens=3), prompt=OTHER, prompt_logprobs=True),
        request("topk", replace(GREEDY, max_tokens=2), prompt_logprobs=True, topk=5),
        request("topk_adapter", replace(GREEDY, max_tokens=2), adapter=ADAPTER, prompt_logprobs=True, topk=3),
        request("too_many", replace(GREEDY, max_tokens=2), topk=60),
        request("stop_token", stop_token),
        request("last_is_stop", replace(stop_token, max_tokens=10)),
        request("stop_string", replace(GREEDY, stop_strings=(_text(greedy[11:13]),))),
        request("model_ends", replace(GREEDY, max_tokens=300, stop_tokens=None)),
    ]


def draw(engine: Engine, one: SampleRequest) -> SampleResult:
    """Return what the engine answers."""
    engine.sampler.submit(one)
    outcomes: dict[str, SampleResult | EngineError] = {}
    while one.request_id not in outcomes:
        outcomes.update(engine.sampler.step())
    result = outcomes[one.request_id]
    assert isinstance(result, SampleResult), result
    return result


def assert_same(drawn: SampleResult, expected: SampleResult, *, tolerance: float = 1e-3) -> None:
    """Compare a server's answer with the engine's, token for token and logprob for logprob."""
    assert len(drawn.sequences) == len(expected.sequences)
    for one, other in zip(drawn.sequences, expected.sequences, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.stop_reason == other.stop_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=tolerance, rtol=0)
    assert_same_scores(drawn, expected, tolerance=tolerance)


def assert_same_scores(drawn: SampleResult, expected: SampleResult, *, tolerance: float = 1e-3) -> None:
    """Compare what is said of the prompt."""
    assert (drawn.prompt_logprobs is None) == (expected.prompt_logprobs is None)
    if drawn.prompt_logprobs is not None and expected.prompt_logprobs is not None:
        np.testing.assert_allclose(drawn.prompt_logprobs, expected.prompt_logprobs, atol=tolerance, rtol=0)
    assert (drawn.topk_prompt_logprobs is None) == (expected.topk_prompt_logprobs is None)
    if drawn.topk_prompt_logprobs is not None and expected.topk_prompt_logprobs is not None:
        assert (
            drawn.topk_prompt_logprobs.token_ids.tolist() == expected.topk_prompt_logprobs.token_ids.tolist()
        )
        np.testing.assert_allclose(
            drawn.topk_prompt_logprobs.logprobs,
            expected.topk_prompt_logprobs.logprobs,
            atol=tolerance,
            rtol=0,
        )


def score(engine: Engine, one: SampleRequest, result: SampleResult) -> list[np.ndarray]:
    """Return the engine's log-probabilities of the tokens that somebody else has drawn."""
    scores = []
    for index, sequence in enumerate(result.sequences):
        whole = (*one.prompt.tolist(), *sequence.tokens.tolist())
        params = SamplingParams(max_tokens=1, seed=0, temperature=0.0, stop_tokens=())
        asked = request(f"score-{index}", params, prompt=whole, adapter=one.sampler_id, prompt_logprobs=True)
        logprobs = draw(engine, asked).prompt_logprobs
        assert logprobs is not None
        scores.append(logprobs[len(one.prompt) :])
    return scores


def _text(tokens: np.ndarray) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(DIRECTORY / "tokenizer.json")).decode(tokens.tolist()))


def by_name(engine: Engine) -> Mapping[str, SampleRequest]:
    """Return the cases by their names."""
    return {one.request_id: one for one in all_of(engine)}
