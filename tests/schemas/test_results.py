"""Results survive the stored protobuf, in the form that both SDKs decode, and render to valid JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runs.schemas import responses
from runs.schemas import tinker_pb2 as pb
from runs.schemas.results import (
    FILLER_LOGPROB,
    SampledSequence,
    SampleOutput,
    TopkLogprobs,
    decode_forward_backward,
    decode_sample,
    encode_forward_backward,
    encode_sample,
    has_mixed_shapes,
    render_forward_backward_json,
    render_sample_json,
)

LOGPROBS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ARRAYS = st.sampled_from([(1,), (3,), (2, 2), (1, 2), (2, 3)]).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=LOGPROBS)
)


def sequence(tokens: list[int], *, logprob: float = -0.5, stop_reason: Any = "stop") -> SampledSequence:
    logprobs = np.full(len(tokens), logprob, np.float32)
    return SampledSequence(tokens=np.array(tokens, np.int64), logprobs=logprobs, stop_reason=stop_reason)


@given(st.lists(ARRAYS, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_logprobs_of_any_mix_of_shapes_come_back_in_order(logprobs: list[Any]) -> None:
    stored = encode_forward_backward(logprobs, {"loss:sum": 1.5})
    decoded, metrics = decode_forward_backward(stored)
    assert metrics == {"loss:sum": 1.5}
    outputs = json.loads(render_forward_backward_json(stored))["loss_fn_outputs"]
    for array, stored_array, output in zip(logprobs, decoded, outputs, strict=True):
        np.testing.assert_array_equal(array, stored_array)
        assert stored_array.shape == array.shape == tuple(output["logprobs"]["shape"])
        assert np.array_equal(np.array(output["logprobs"]["data"], np.float32), array.ravel())


def test_one_shape_is_one_record() -> None:
    arrays = [np.zeros(n, np.float32) for n in (3, 1, 2)]
    output = pb.ForwardBackwardOutput.FromString(encode_forward_backward(arrays, {}))
    (record,) = output.loss_fn_outputs
    assert record.num_datums == 3
    assert np.frombuffer(record.fields["logprobs"].offsets, "<i8").tolist() == [0, 12, 16, 24]
    assert list(record.fields["logprobs"].trailing_shape) == []


def test_mixed_shapes_can_be_told() -> None:
    narrow, wide = np.zeros(2), np.zeros((2, 2))
    assert [
        has_mixed_shapes(encode_forward_backward(arrays, {}))
        for arrays in ([narrow] * 2, [wide] * 2, [wide, narrow])
    ] == [False, False, True]


def test_two_dimensions_have_a_trailing_shape() -> None:
    output = pb.ForwardBackwardOutput.FromString(
        encode_forward_backward([np.zeros((3, 2)), np.zeros((1, 2)), np.zeros(4)], {})
    )
    assert [list(record.fields["logprobs"].trailing_shape) for record in output.loss_fn_outputs] == [[2], []]
    assert [record.num_datums for record in output.loss_fn_outputs] == [2, 1]


@pytest.mark.parametrize("name", ["loss", "a:b:c"])
def test_metric_names_that_clients_raise_on(name: str) -> None:
    with pytest.raises(ValueError, match="name:reduction"):
        encode_forward_backward([np.zeros(1)], {name: 1.0})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_stored(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        encode_forward_backward([np.zeros(1)], {"loss:sum": value})
    with pytest.raises(ValueError, match="not finite"):
        encode_forward_backward([np.array([0.0, value])], {})
    with pytest.raises(ValueError, match="not finite"):
        encode_sample(SampleOutput(sequences=(sequence([1], logprob=value),)))
    assert responses.optim_step_result({"a": value, "b": 1.0}) == {"metrics": {"b": 1.0}}


def test_a_whole_sample() -> None:
    topk = TopkLogprobs(
        token_ids=np.array([[0, 0], [7, 8], [9, 0]]),
        logprobs=np.array([[FILLER_LOGPROB] * 2, [-0.5, -1.5], [-0.25, FILLER_LOGPROB]], np.float32),
    )
    stored = encode_sample(
        SampleOutput(
            sequences=(sequence([4, 5]), sequence([], stop_reason="length")),
            prompt_logprobs=np.array([math.nan, -1.5, -2.5], np.float32),
            topk_prompt_logprobs=topk,
        )
    )
    assert json.loads(render_sample_json(stored)) == {
        "type": "sample",
        "sequences": [
            {"stop_reason": "stop", "tokens": [4, 5], "logprobs": [-0.5, -0.5]},
            {"stop_reason": "length", "tokens": [], "logprobs": []},
        ],
        "prompt_logprobs": [None, -1.5, -2.5],
        "topk_prompt_logprobs": [None, [[7, -0.5], [8, -1.5]], [[9, -0.25]]],
    }
    output = decode_sample(stored)
    assert output.topk_prompt_logprobs is not None
    np.testing.assert_array_equal(output.topk_prompt_logprobs.token_ids, topk.token_ids)
    assert encode_sample(output) == stored


def test_what_was_not_asked_for_is_absent() -> None:
    response = pb.SampleResponse.FromString(encode_sample(SampleOutput(sequences=(sequence([1]),))))
    assert not response.HasField("prompt_logprobs")
    assert not response.HasField("topk_prompt_logprobs")


def test_results_are_never_taken_for_failures_or_delays() -> None:
    stored = [
        render_forward_backward_json(encode_forward_backward([np.zeros(1)], {"loss:sum": 0.0})),
        render_sample_json(encode_sample(SampleOutput(sequences=(sequence([1]),)))),
    ]
    for result in map(json.loads, stored):
        assert "error" not in result
        assert "status" not in result
        assert result.get("type") != "try_again"
