"""What the real SDKs sent is read, and what they were sent is reproduced."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from runs.schemas import forward_backward, requests, responses, results, sampling
from runs.schemas import tinker_pb2 as pb
from runs.schemas.parsing import decompress, validate
from tests.schemas import captures

LIMIT_BYTES = 1 << 20

REQUESTS: dict[str, type[requests.SdkRequest]] = {
    "/create_session": requests.CreateSession,
    "/session_heartbeat": requests.SessionHeartbeat,
    "/finish": requests.FinishSession,
    "/create_model": requests.CreateModel,
    "/get_info": requests.GetInfo,
    "/optim_step": requests.OptimStep,
    "/save_weights": requests.SaveWeights,
    "/save_weights_for_sampler": requests.SaveWeightsForSampler,
    "/load_weights": requests.LoadWeights,
    "/weights_info": requests.WeightsInfo,
    "/ttl": requests.SetTtl,
    "/create_sampling_session": sampling.CreateSamplingSession,
    "/asample": sampling.Sample,
    "/retrieve_future": requests.RetrieveFuture,
}
# Answered without a look at the body.
NOT_READ = ("/auth/token", "/client/config", "/client/dynamic_config", "/telemetry")
# Answered 404.
NOT_SERVED = (
    "/project",
    "/sessions/search",
    "/save_weights_external",
    "/copy_weights",
    "/retrieve_futures",
    "/mint/checkpoints/interpolate",
)


def json_requests() -> list[str]:
    with_body = []
    for name in captures.names("request"):
        request = captures.read(name, "request")
        is_read = not request["path"].endswith(NOT_SERVED + NOT_READ)
        if is_read and request["method"] != "GET" and request.get("body") is not None:
            with_body.append(name)
    return [
        name for name in with_body if "forward" not in captures.read(name, "request")["path"].split("/")[-1]
    ]


def model_of(path: str) -> type[requests.SdkRequest]:
    matches = [suffix for suffix in REQUESTS if path.endswith(suffix)]
    return REQUESTS[max(matches, key=len)]


@pytest.mark.parametrize("name", json_requests())
def test_it_reads_every_captured_json_request_and_stores_it(name: str) -> None:
    exchange = captures.read(name, "request")
    model = model_of(exchange["path"])
    request = validate(model, captures.body_bytes(exchange))
    if model is not requests.SetTtl:  # the one body where null says something, and it is not stored
        stored = requests.canonical_json(request)
        assert requests.from_canonical(model, stored) == request
        assert_agree(exchange["body"], json.loads(stored))


def assert_agree(sent: Any, kept: Any) -> None:
    """Whatever was sent and kept is the same."""
    if isinstance(kept, dict):
        for key in kept.keys() & sent.keys():
            assert_agree(sent[key], kept[key])
    else:
        assert kept == sent


@pytest.mark.parametrize("name", captures.names("request", content="/api/v1/forward"))
def test_it_reads_every_captured_forward_backward(name: str) -> None:
    exchange = captures.read(name, "request")
    headers, body = exchange["headers"], captures.body_bytes(exchange)
    plain = decompress(body, headers.get("content-encoding"), limit=LIMIT_BYTES)
    is_proto = headers["content-type"] == "application/x-protobuf"
    parse = forward_backward.parse_proto_request if is_proto else forward_backward.parse_json_request
    payload = parse(plain)
    assert payload.model_id.endswith(":train:0")
    assert payload.forward_only == ("forward_only" in name or exchange["path"].endswith("/forward"))
    (first, *_) = payload.data
    assert first.tokens.tolist() == [1, 2, 3]
    assert first.target_tokens.tolist() == [2, 3, 4]
    assert all(array.dtype == np.float32 and array.shape == (3,) for array in first.inputs.values())


@pytest.mark.parametrize("name", ["forward_backward", "forward_backward_ppo"])
def test_both_sdks_store_the_same_bytes_for_the_same_batch(name: str) -> None:
    old = forward_backward.parse_json_request(captures.body_bytes(captures.read(f"0.22/{name}", "request")))
    new = forward_backward.parse_proto_request(captures.body_bytes(captures.read(f"0.38/{name}", "request")))
    assert old.loss_config == new.loss_config
    assert [datum.inputs.keys() for datum in old.data] == [datum.inputs.keys() for datum in new.data]
    from_json = pb.ForwardBackwardRequest.FromString(forward_backward.to_bytes(old))
    from_proto = pb.ForwardBackwardRequest.FromString(forward_backward.to_bytes(new))
    if name == "forward_backward":  # the ppo captures hold different numbers
        assert from_json == from_proto


@pytest.mark.parametrize("name", captures.names("response", content='"ForwardBackwardOutput"'))
def test_it_reproduces_captured_forward_backward_protobuf(name: str) -> None:
    sent = pb.ForwardBackwardOutput.FromString(captures.body_bytes(captures.read(name, "response")))
    logprobs, metrics = results.decode_forward_backward(sent.SerializeToString())
    assert pb.ForwardBackwardOutput.FromString(results.encode_forward_backward(logprobs, metrics)) == sent


@pytest.mark.parametrize("name", captures.names("response", content='"SampleResponse"'))
def test_it_reproduces_captured_sample_protobuf(name: str) -> None:
    body = captures.body_bytes(captures.read(name, "response"))
    output = results.decode_sample(body)
    sent, made = (pb.SampleResponse.FromString(b) for b in (body, results.encode_sample(output)))
    assert made == sent


@pytest.mark.parametrize("name", ["forward_backward", "forward"])
def test_it_renders_captured_forward_backward_json(name: str) -> None:
    sent = captures.read(f"0.22/{name}.retrieve_future", "response")["body"]
    logprobs = [np.array(output["logprobs"]["data"]) for output in sent["loss_fn_outputs"]]
    stored = results.encode_forward_backward(logprobs, sent["metrics"])
    assert json.loads(results.render_forward_backward_json(stored)) == sent


@pytest.mark.parametrize("name", ["asample", "asample_compute_logprobs", "asample_prompt_logprobs"])
def test_it_renders_captured_sample_json(name: str) -> None:
    sent = captures.read(f"0.22/{name}.retrieve_future", "response")["body"]
    stored = captures.body_bytes(captures.read(f"0.38/{name}.retrieve_future", "response"))
    rendered = json.loads(results.render_sample_json(stored))
    for sequence in rendered["sequences"]:
        sequence["logprobs"] = [round(logprob, 6) for logprob in sequence["logprobs"]]
    assert rendered == sent


REMAKE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "try_again": lambda body: responses.try_again(
        body["request_id"], body["queue_state"], reason=body["queue_state_reason"]
    ),
    "create_model": lambda body: responses.create_model_result(body["model_id"]),
    "save_weights": lambda body: responses.save_weights_result(body["path"]),
    "save_weights_for_sampler": lambda body: (
        responses.ephemeral_sampler_result(body["sampling_session_id"])
        if "sampling_session_id" in body
        else responses.save_weights_for_sampler_result(body["path"])
    ),
    "load_weights": lambda body: responses.load_weights_result(body["path"], model_id=body["model_id"]),
    "optim_step": lambda body: responses.optim_step_result(body["metrics"]),
}


def remake(body: dict[str, Any]) -> Any:
    named = "optim_step" if list(body) == ["metrics"] else None
    make = REMAKE.get(named or body.get("type") or body.get("status") or "")
    return make(body) if make else None


def future_results() -> list[str]:
    names = captures.names("response", content='"application/json"')
    return [
        name
        for name in names
        if ".retrieve_future" in name and remake(captures.read(name, "response")["body"])
    ]


@pytest.mark.parametrize("name", future_results())
def test_it_reproduces_captured_results_of_operations(name: str) -> None:
    body = captures.read(name, "response")["body"]
    assert remake(body) == body


def submit_answers() -> list[str]:
    names = captures.names("response", content='"request_id"')
    bodies = {name: captures.read(name, "response")["body"] for name in names}
    return [name for name, body in bodies.items() if "request_id" in body and "type" not in body]


@pytest.mark.parametrize("name", submit_answers())
def test_it_reproduces_captured_answers_to_submits(name: str) -> None:
    body = captures.read(name, "response")["body"]
    made = responses.untyped_future(
        body["request_id"], body.get("model_id"), sample_sequence_ids=body.get("sample_sequence_ids")
    )
    assert made == body


def test_a_replay_with_another_sampling_session_number_has_the_same_digest() -> None:
    digests = {
        requests.request_digest(
            validate(
                requests.SaveWeightsForSampler,
                captures.body_bytes(
                    captures.read(f"0.22-retry/save_weights_for_sampler_ephemeral.try{attempt}", "request")
                ),
            )
        )
        for attempt in (1, 2, 3)
    }
    assert len(digests) == 1
