"""Values out of range and features that the server lacks are refused at their place, by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from runs import ids
from runs.exceptions import RequestInvalid
from runs.schemas import requests, sampling
from runs.schemas.parsing import validate, validate_object

LOAD = {"path": "tinker://run/weights/a", "optimizer": False}
SAMPLE = {
    "sampling_session_id": "s:sample:0",
    "seq_id": 0,
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
    "sampling_params": {"max_tokens": 4},
}


def check(model: type[requests.SdkRequest], body: dict[str, Any], place: str, rule: str) -> None:
    with pytest.raises(RequestInvalid, match=rule) as caught:
        validate(model, json.dumps(body).encode())
    assert caught.value.place == place


@pytest.mark.parametrize("rank", [0, -1, 1.5, 1025, 10**6, "8", True, None])
def test_lora_rank(rank: object) -> None:
    body = {"session_id": "s", "model_seq_id": 0, "base_model": "m", "lora_config": {"rank": rank}}
    check(requests.CreateModel, body, "lora_config.rank", "must be")


def test_lora_trains_something() -> None:
    flags = {"train_unembed": False, "train_mlp": False, "train_attn": False}
    body = {"session_id": "s", "model_seq_id": 0, "base_model": "m", "lora_config": flags}
    check(requests.CreateModel, body, "lora_config", "at least one of")


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 1.0])
def test_lora_seed(seed: object) -> None:
    body = {"session_id": "s", "model_seq_id": 0, "base_model": "m", "lora_config": {"seed": seed}}
    check(requests.CreateModel, body, "lora_config.seed", "must be")


ADAM_BOUNDS = [
    ("learning_rate", -1e-9),
    ("learning_rate", 1e9),
    ("learning_rate", "1e-4"),
    ("beta1", 1),
    ("beta1", -0.1),
    ("beta2", 1.0),
    ("beta2", True),
    ("eps", 0),
    ("eps", -1),
    ("weight_decay", -0.1),
]


@pytest.mark.parametrize(("name", "value"), ADAM_BOUNDS)
def test_adam_bounds(name: str, value: object) -> None:
    body = {"model_id": "m", "seq_id": 1, "adam_params": {name: value}}
    check(requests.OptimStep, body, f"adam_params.{name}", "must be")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", requests.AdamParams.model_fields)
def test_adam_params_are_finite_even_past_the_parser(name: str, value: float) -> None:
    body = {"model_id": "m", "seq_id": 1, "adam_params": {name: value}}
    with pytest.raises(RequestInvalid, match="must be") as caught:
        validate_object(requests.OptimStep, body)
    assert caught.value.place == f"adam_params.{name}"


def test_only_adam() -> None:
    body = {"model_id": "m", "seq_id": 1, "optimizer_params": {"type": "dimuon", "learning_rate": 1e-4}}
    check(requests.OptimStep, body, "adam_params", "'dimuon' is not supported")
    body = {"session_id": "s", "model_seq_id": 0, "base_model": "m", "optimizer_config": {"type": "dimuon"}}
    check(requests.CreateModel, body, "optimizer_config", "'dimuon' is not supported")


def test_adam_by_either_key() -> None:
    params = {"learning_rate": 0.5, "beta1": 0.1}
    by_key = [
        validate(requests.OptimStep, json.dumps({"model_id": "m", "seq_id": 1, key: params}).encode())
        for key in ("adam_params", "optimizer_params")
    ]
    assert by_key[0] == by_key[1]
    assert by_key[0].adam_params.learning_rate == 0.5
    check(requests.OptimStep, {"model_id": "m", "seq_id": 1}, "adam_params", "is missing")


@pytest.mark.parametrize("seq_id", [-1, 2**63, 1.5, "1", None, True])
def test_seq_id(seq_id: object) -> None:
    check(requests.OptimStep, {"model_id": "m", "seq_id": seq_id, "adam_params": {}}, "seq_id", "must be")


@pytest.mark.parametrize("value", ["", "x" * 201, "a\nb", "a\0b".replace("\0", "\x01"), "\u202eabc", 1, None])
def test_ids(value: object) -> None:
    check(requests.RetrieveFuture, {"request_id": value}, "request_id", "must|should")


SAMPLING_BOUNDS: list[tuple[str, object]] = [
    ("max_tokens", 0),
    ("max_tokens", 10**9),
    ("max_tokens", 1.5),
    ("temperature", -0.1),
    ("temperature", 101),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 2),
    ("top_k", 0),
    ("top_k", -2),
    ("seed", 2**63),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a"] * 10_000),
    ("stop", ["a", 1]),
    ("stop", [-1]),
    ("stop", [True]),
    ("stop", [[1]]),
    ("stop", {"a": 1}),
    ("stop", "x" * 5000),
]


@pytest.mark.parametrize(("name", "value"), SAMPLING_BOUNDS)
def test_sampling_bounds(name: str, value: object) -> None:
    check(
        sampling.Sample, SAMPLE | {"sampling_params": {name: value}}, f"sampling_params.{name}", "must|stop"
    )


@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_sampling_params_are_finite_even_past_the_parser(name: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        validate_object(sampling.Sample, SAMPLE | {"sampling_params": {name: math.nan}})
    assert caught.value.place == f"sampling_params.{name}"


@pytest.mark.parametrize("num_samples", [0, -1, 1025, 10**6])
def test_num_samples(num_samples: int) -> None:
    check(sampling.Sample, SAMPLE | {"num_samples": num_samples}, "num_samples", "must be")


UNSUPPORTED = {
    "prompt_alt_tokens_k": 1,
    "record_stability_info": True,
    "topk_sample_logprobs": 2,
    "target_prompt_logprobs": {"data": [1], "dtype": "int64"},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_sampling_features(name: str) -> None:
    check(sampling.Sample, SAMPLE | {name: UNSUPPORTED[name]}, name, "not supported")


PROMPTS: list[tuple[object, str, str]] = [
    ({"chunks": []}, "prompt", "at least one token"),
    ({"chunks": [{"type": "encoded_text", "tokens": []}]}, "prompt", "at least one token"),
    (
        {"chunks": [{"type": "image", "data": "", "format": "png"}]},
        "prompt.chunks[0]",
        "image chunks are not",
    ),
    ({"chunks": [{"type": "dmel", "dmel": ""}]}, "prompt.chunks[0]", "dmel chunks are not"),
    ({"chunks": [{"type": "image_asset_pointer"}]}, "prompt.chunks[0]", "image_asset_pointer chunks are not"),
    ({"chunks": [{"type": "video", "tokens": [1]}]}, "prompt.chunks[0].type", "must be"),
    ({"chunks": [{"tokens": [1, -1]}]}, "prompt.chunks[0].tokens[1]", "must be"),
    ({"chunks": [{"tokens": [2**31]}]}, "prompt.chunks[0].tokens[0]", "must be"),
    ({"chunks": [{"tokens": [1.5]}]}, "prompt.chunks[0].tokens[0]", "must be"),
]


@pytest.mark.parametrize(("prompt", "place", "rule"), PROMPTS)
def test_prompts(prompt: object, place: str, rule: str) -> None:
    check(sampling.Sample, SAMPLE | {"prompt": prompt}, place, rule)


@pytest.mark.parametrize(
    "extra", [{"prompt_logprobs_last_n": 1}, {"prompt_logprobs": True, "prompt_logprobs_last_n": 2}]
)
def test_prompt_logprobs_last_n(extra: dict[str, Any]) -> None:
    check(sampling.Sample, SAMPLE | extra, "", "prompt_logprobs_last_n needs")


def test_prompt_against_the_base_model() -> None:
    sample = validate(sampling.Sample, json.dumps(SAMPLE).encode())
    sampling.check_prompt(sample, vocab_size=3, max_context=2)
    with pytest.raises(RequestInvalid, match="token 2 is outside the vocabulary of 2") as caught:
        sampling.check_prompt(sample, vocab_size=2, max_context=2)
    assert caught.value.place == "prompt[1]"
    with pytest.raises(RequestInvalid, match="2 tokens, but the context length"):
        sampling.check_prompt(sample, vocab_size=3, max_context=1)


@pytest.mark.parametrize(
    ("stop", "strings", "tokens"),
    [
        (None, (), None),
        ([], (), ()),
        ("a", ("a",), None),
        (["a", "b"], ("a", "b"), None),
        ([1, 2], (), (1, 2)),
    ],
)
def test_stops(stop: object, strings: tuple[str, ...], tokens: tuple[int, ...] | None) -> None:
    params = validate_object(sampling.SamplingParams, {"stop": stop})
    assert (params.stop_strings, params.stop_tokens) == (strings, tokens)


BAD_NAMES = [
    "",
    "../a",
    "..",
    ".hidden",
    "/etc/passwd",
    "%2e%2e",
    "a\\b",
    "a/b",
    "a b",
    "a ",
    "a\x01",
    "x" * 129,
    "\u202ea",
    "e\u0301",
    "\u00e9",
    "\U0001f600",
    "a\n",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_checkpoint_names(name: str) -> None:
    check(requests.SaveWeights, {"model_id": "m", "seq_id": 1, "path": name}, "path", "a checkpoint name is")
    path = f"tinker://run/weights/{name}"
    check(requests.WeightsInfo, {"tinker_path": path}, "tinker_path", "checkpoint name|must")


@pytest.mark.parametrize("name", ["000080", "step_1000", "final", "v1.2", "A-b", "CON", "a.", "x" * 128])
def test_good_checkpoint_names(name: str) -> None:
    text = f"tinker://s:train:0/sampler_weights/{name}"
    assert requests.WeightsInfo.model_validate({"tinker_path": text}).tinker_path == text
    assert ids.parse_path(text) == ids.CheckpointPath("s:train:0", "sampler_weights", name)


BAD_PATHS = [
    "",
    "tinker://",
    "tinker://a/b",
    "tinker://a/weights",
    "tinker:///weights/a",
    "mint://a/weights/b",
]


@pytest.mark.parametrize("path", [*BAD_PATHS, "tinker://a/other/b", "tinker://a/weights/b/c", "a/weights/b"])
def test_tinker_paths(path: str) -> None:
    check(requests.WeightsInfo, {"tinker_path": path}, "tinker_path", "must be tinker://")


ONE_OF = [
    (requests.LoadWeights, LOAD),
    (requests.LoadWeights, LOAD | {"model_id": "m"}),
    (requests.LoadWeights, LOAD | {"model_id": "m", "seq_id": 1, "session_id": "s", "model_seq_id": 0}),
    (requests.SaveWeightsForSampler, {"model_id": "m", "seq_id": 1}),
    (
        requests.SaveWeightsForSampler,
        {"model_id": "m", "seq_id": 1, "path": "a", "sampling_session_seq_id": 0},
    ),
    (sampling.CreateSamplingSession, {"session_id": "s", "sampling_session_seq_id": 0}),
]


@pytest.mark.parametrize(("model", "body"), ONE_OF)
def test_forms_that_exclude_each_other(model: type[requests.SdkRequest], body: dict[str, Any]) -> None:
    check(model, body, "", "give ")


def test_unsupported_saves() -> None:
    body = {"model_id": "m", "seq_id": 1, "sampling_session_seq_id": 0, "kind": "inflight"}
    check(requests.SaveWeightsForSampler, body, "kind", "'inflight' is not supported")


@pytest.mark.parametrize("ttl", [0, -1, 1.5, 10**10])
def test_ttl(ttl: object) -> None:
    check(requests.SetTtl, {"ttl_seconds": ttl}, "ttl_seconds", "must be")


def test_metadata_is_kept_as_text_and_bounded() -> None:
    request = validate(requests.CreateSession, b'{"user_metadata": {"a": "x", "b": [1, null]}}')
    assert request.user_metadata == {"a": "x", "b": "[1, null]"}
    check(requests.CreateSession, {"user_metadata": {"a": "x" * 20_000}}, "user_metadata", "at most")
    check(
        requests.CreateSession,
        {"user_metadata": dict.fromkeys(map(str, range(65)), "")},
        "user_metadata",
        "64",
    )


def test_secrets_are_not_stored() -> None:
    body = LOAD | {"model_id": "m", "seq_id": 1, "weights_access_token": "tml-secret"}
    request = validate(requests.LoadWeights, json.dumps(body).encode())
    assert request.weights_access_token == "tml-secret"
    assert b"secret" not in requests.canonical_json(request)
