from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import SamplingError
from gpuworker.engine.types import (
    SampleResult,
    StopReason,
)

from .conftest import VOCAB_SIZE
from .sampling_requests import GREEDY, WARM, assert_same, finish, make_request, sample_one


def test_a_stop_token_is_included_once(engine: Engine) -> None:
    full = sample_one(engine, make_request("full")).sequences[0].tokens
    stop = int(full[4])
    first = full.tolist().index(stop)
    params = replace(GREEDY, stop_tokens=(VOCAB_SIZE - 1, stop))
    result = sample_one(engine, make_request("stop", params=params)).sequences[0]
    np.testing.assert_array_equal(result.tokens, full[: first + 1])
    assert result.stop_reason is StopReason.STOP
    assert len(result.logprobs) == first + 1


def test_the_models_end_token_stops_by_default(engine: Engine) -> None:
    """Warm enough, every sequence meets token 1 sooner or later; an empty tuple never stops."""
    params = replace(WARM, temperature=50.0, max_tokens=110, stop_tokens=None)
    request = replace(make_request("eos", 5, params=params), num_samples=16)
    ended = [s for s in sample_one(engine, request).sequences if s.stop_reason is StopReason.STOP]
    assert ended
    for sequence in ended:
        assert sequence.tokens[-1] == 1
        assert 1 not in sequence.tokens[:-1]
    never = replace(request, params=replace(params, stop_tokens=()))
    assert all(s.stop_reason is StopReason.LENGTH for s in sample_one(engine, never).sequences)


def test_a_stop_string_across_tokens_ends_with_the_token_that_completes_it(
    engine: Engine, model_directory: Callable[[str], Path]
) -> None:
    tokenizer = Tokenizer.from_file(str(model_directory("qwen3") / "tokenizer.json"))
    params = replace(WARM, max_tokens=60)
    full = sample_one(engine, make_request("text", params=params)).sequences[0].tokens.tolist()
    for first in range(len(full) - 2):
        stop = tokenizer.decode(full[first : first + 3], skip_special_tokens=False)[1:-1]
        if stop and "\ufffd" not in stop:
            break
    else:
        raise AssertionError("no readable piece of text was sampled")
    end = next(n for n in range(1, 61) if stop in tokenizer.decode(full[:n], skip_special_tokens=False))
    request = make_request("stopped", params=replace(params, stop_strings=("not there", stop)))
    result = sample_one(engine, request).sequences[0]
    assert result.tokens.tolist() == full[:end]
    assert result.stop_reason is StopReason.STOP


@pytest.mark.parametrize("length", [120, 127, 128])
def test_sampling_stops_at_the_end_of_the_context(engine: Engine, length: int) -> None:
    request = make_request("long", length, params=replace(GREEDY, max_tokens=500))
    result = sample_one(engine, replace(request, prompt_logprobs=True))
    assert len(result.sequences[0].tokens) == 128 - length
    assert result.sequences[0].stop_reason is StopReason.LENGTH
    assert result.prompt_logprobs is not None
    assert np.isfinite(result.prompt_logprobs[1:]).all()


def test_max_tokens_ends_with_length_and_zero_is_allowed(engine: Engine) -> None:
    for max_tokens in (0, 1, 5):
        params = replace(GREEDY, max_tokens=max_tokens)
        sequence = sample_one(engine, make_request("max", params=params)).sequences[0]
        assert len(sequence.tokens) == len(sequence.logprobs) == max_tokens
        assert sequence.stop_reason is StopReason.LENGTH


def test_cancelling_frees_the_request_and_no_other(engine: Engine) -> None:
    expected = sample_one(engine, make_request("stays", 8)).sequences[0]
    for request in (make_request("goes", 6), make_request("stays", 8)):
        engine.sampler.submit(request)
    assert engine.sampler.step() == []
    assert engine.sampler.num_pending == 2
    assert engine.sampler.cancel("goes")
    assert not engine.sampler.cancel("goes")
    assert engine.sampler.num_pending == 1
    outcomes = finish(engine.sampler)
    assert outcomes.keys() == {"stays"}
    assert isinstance(outcomes["stays"], SampleResult)
    assert_same(outcomes["stays"].sequences[0], expected)


def test_stop_strings_need_a_tokenizer(model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    for path in model_directory("qwen3").iterdir():
        if path.name != "tokenizer.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    engine = Engine.load(tmp_path, device="cpu", dtype="float32")
    with pytest.raises(SamplingError, match=r"tokenizer\.json"):
        engine.sampler.submit(make_request("s", params=replace(GREEDY, stop_strings=("x",))))
