"""Bad forward_backward requests are refused at their place, in the same words on both wires."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runs.exceptions import RequestInvalid
from runs.schemas import tinker_pb2 as pb
from runs.schemas.forward_backward import MAX_DATUMS, parse_json_request, parse_proto_request
from tests.schemas.batches import (
    both_wires,
    datum,
    good_datum,
    json_body,
    proto_body,
    rl_datum,
    sparse,
    tensor,
    two_dimensional,
)

INPUTS = "data[0].loss_fn_inputs"

# -- bad, on both wires -------------------------------------------------------------------------------

BAD_DATA: list[tuple[list[dict[str, Any]], str, str]] = [
    ([], "data", "at least 1 item|1 to 65536 datums"),
    ([datum([])], "data[0].model_input", "at least one token"),
    ([{"model_input": {"chunks": []}, "loss_fn_inputs": {}}], "data[0].model_input.chunks", "at least one chunk"),
    ([datum([1])], INPUTS, "needs target_tokens, weights"),
    ([datum([1], target_tokens=tensor([1], "int64"))], INPUTS, "needs weights"),
    ([good_datum(), datum([1, -5])], "data[1].model_input.chunks[0].tokens[1]", "at least 0|or equal to 0"),
    (
        [datum([1, 2], target_tokens=tensor([1, 2, 3], "int64"), weights=tensor([1.0, 1.0]))],
        f"{INPUTS}.target_tokens",
        "has 3 values, but model_input has 2 tokens",
    ),
    (
        [datum([1, 2], target_tokens=tensor([1, 2], "int64"), weights=tensor([1.0]))],
        f"{INPUTS}.weights",
        "has 1 values, but target_tokens has 2 values",
    ),
    (
        [datum([1], target_tokens=tensor([-1], "int64"), weights=tensor([1.0]))],
        f"{INPUTS}.target_tokens[0]",
        "must be at least 0, got -1",
    ),
    ([datum([1], target_tokens=tensor([1.0]), weights=tensor([1.0]))], f"{INPUTS}.target_tokens", "dtype int64"),
    (
        [datum([1], target_tokens=tensor([1], "int64"), weights=tensor([1], "int64"))],
        f"{INPUTS}.weights",
        "dtype float32, got int64",
    ),
    (
        [datum([1, 2], target_tokens=tensor([1, 2], "int64"), weights=tensor([1.0, 1.0], shape=[3]))],
        f"{INPUTS}.weights",
        r"has 2 values, but its shape \[3\] needs 3",
    ),
    (
        [datum([1], target_tokens=tensor([1], "int64"), weights=tensor([1.0], shape=[-1]))],
        f"{INPUTS}.weights.shape[0]",
        "at least 0, got -1",
    ),
    (
        [datum([1], target_tokens=tensor([1], "int64"), weights=tensor([1.0], shape=[1, 1, 1]))],
        f"{INPUTS}.weights.shape",
        "3 dimensions",
    ),
    ([two_dimensional(weights=tensor([1.0, 1.0]))], f"{INPUTS}.weights", r"target_tokens has shape \[2, 2\]"),
    ([two_dimensional(target_tokens=sparse([1, 2], "int64", shape=None))], f"{INPUTS}.target_tokens", "a shape of 2"),
    ([two_dimensional(weights=sparse([1.0, 2.0], sparse_crow_indices=[0, 2]))], f"{INPUTS}.weights.sparse_crow_indices", "2 rows need 3"),
    ([two_dimensional(weights=sparse([1.0, 2.0], sparse_crow_indices=[0, 2, 1]))], f"{INPUTS}.weights.sparse_crow_indices", "must rise"),
    ([two_dimensional(weights=sparse([1.0, 2.0], sparse_col_indices=[0]))], f"{INPUTS}.weights.sparse_col_indices", "1 entries for 2 values"),
    ([two_dimensional(weights=sparse([1.0, 2.0], sparse_col_indices=[0, 2]))], f"{INPUTS}.weights.sparse_col_indices[1]", "0 to 1, got 2"),
    (
        [two_dimensional(weights=sparse([1.0, 2.0], sparse_crow_indices=[0, 2, 2], sparse_col_indices=[1, 1]))],
        f"{INPUTS}.weights.sparse_col_indices",
        "one element twice",
    ),
    ([two_dimensional(weights=sparse([1.0, 2.0], shape=[2, 2**33]))], f"{INPUTS}.weights", "too large"),
    (
        [{**good_datum(), "model_input": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}],
        "data[0].model_input.chunks[0]",
        "image chunks are not supported",
    ),
    (
        [{**good_datum(), "model_input": {"chunks": [{"type": "dmel", "dmel": ""}]}}],
        "data[0].model_input.chunks[0]",
        "dmel chunks are not supported",
    ),
]  # fmt: skip


@both_wires
@pytest.mark.parametrize(("data", "place", "rule"), BAD_DATA)
def test_bad_data(parse: Any, data: Any, place: str, rule: str) -> None:
    with pytest.raises(RequestInvalid, match=rule) as caught:
        parse(data)
    assert caught.value.place == place


@both_wires
@pytest.mark.parametrize("name", ["clip_low_threshold", "clip_high_threshold", "sequence_ratio_mask"])
def test_tensors_that_would_change_the_loss_are_not_ignored(parse: Any, name: str) -> None:
    with pytest.raises(RequestInvalid, match="leave the tensor out") as caught:
        parse([rl_datum(**{name: tensor([1.0, 1.0])})], "ppo")
    assert caught.value.place == f"{INPUTS}.{name}"


@both_wires
def test_negative_weights_beside_other_losses(parse: Any) -> None:
    with pytest.raises(RequestInvalid, match="at least 0, got -1") as caught:
        parse([rl_datum(weights=tensor([1.0, -1.0]))], "ppo")
    assert caught.value.place == f"{INPUTS}.weights[1]"


@both_wires
def test_two_dimensional_targets_beside_other_losses(parse: Any) -> None:
    wide = rl_datum(target_tokens=tensor([1, 2, 3, 4], "int64", shape=[2, 2]))
    with pytest.raises(RequestInvalid, match="for cross_entropy only"):
        parse([wide], "ppo")


@both_wires
@pytest.mark.parametrize("loss_fn", ["gspo", "stable_reinforce", "custom", "nonsense", ""])
def test_loss_functions_by_name(parse: Any, loss_fn: str) -> None:
    with pytest.raises(RequestInvalid, match="use one of cross_entropy, importance_sampling") as caught:
        parse([good_datum()], loss_fn)
    assert caught.value.place == "loss_fn"


@both_wires
@pytest.mark.parametrize(
    ("loss_fn", "config", "place", "rule"),
    [
        (
            "ppo",
            {"clip_low": 0.8},
            "loss_fn_config.clip_low",
            "it takes clip_low_threshold, clip_high_threshold",
        ),
        ("cross_entropy", {"beta": 1}, "loss_fn_config.beta", "it takes none"),
        ("dro", {"beta": "0.1"}, "loss_fn_config.beta", "must be a number, got '0.1'"),
        ("dro", {"beta": -0.1}, "loss_fn_config.beta", "at least 0, got -0.1"),
        ("ppo", {"clip_low_threshold": 2, "clip_high_threshold": 1}, "loss_fn_config", "above clip_high"),
        ("dro", {"loss\n": 1.0}, "loss_fn_config.'loss\\n'", "no such setting"),
    ],
)
def test_loss_config(parse: Any, loss_fn: str, config: dict[str, Any], place: str, rule: str) -> None:
    with pytest.raises(RequestInvalid, match=rule) as caught:
        parse([good_datum()], loss_fn, config=config)
    assert caught.value.place == place


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_in_protobuf(value: float) -> None:
    item = two_dimensional(weights=tensor([1.0, 1.0, value, 1.0], shape=[2, 2]))
    with pytest.raises(RequestInvalid, match="must be finite") as caught:
        parse_proto_request(proto_body([item]))
    assert caught.value.place == f"{INPUTS}.weights[1][0]"
    with pytest.raises(RequestInvalid, match="must be finite"):
        parse_proto_request(proto_body([rl_datum()], "dro", config={"beta": value}))


# -- bad, on one wire ---------------------------------------------------------------------------------

BAD_JSON_VALUES: list[tuple[list[Any], str, str, str]] = [
    ([1.0, True, 1.0], "float32", "weights[1]", "must be a number, got true"),
    ([1.0, "1", 1.0], "float32", "weights[1]", "must be a number, got '1'"),
    ([1.0, None, 1.0], "float32", "weights[1]", "must be a number, got null"),
    ([1.0, 1e39, 1.0], "float32", "weights[1]", "finite float32, got 1e\\+39"),
    ([1.0, 10**299, 1.0], "float32", "weights[1]", "finite float32"),
    ([1, 2.5, 3], "int64", "target_tokens[1]", "must be an integer, got 2.5"),
    ([1, 2, 2**63], "int64", "target_tokens[2]", "fit in 64 bits, got 9223372036854775808"),
]


@pytest.mark.parametrize(("values", "dtype", "name", "rule"), BAD_JSON_VALUES)
def test_bad_json_values(values: list[Any], dtype: str, name: str, rule: str) -> None:
    item = good_datum(3)
    item["loss_fn_inputs"][name.split("[")[0]] = tensor(values, dtype)
    with pytest.raises(RequestInvalid, match=rule) as caught:
        parse_json_request(json_body([item]))
    assert caught.value.place == f"{INPUTS}.{name}"


BAD_JSON_BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({"model_id": None}, "model_id", "must be a valid string"),
    ({"seq_id": -1}, "seq_id", "greater than or equal to 0"),
    ({"seq_id": 2**63}, "seq_id", "less than or equal"),
    ({"forward_backward_input": None}, "", "one of forward_backward_input and forward_input"),
    ({"forward_input": {}}, "", "one of forward_backward_input and forward_input"),
    ({"forward_backward_input": []}, "", "must be a JSON object"),
    ({"forward_backward_input": {"data": {}, "loss_fn": "ppo"}}, "data", "must be a valid list"),
    ({"forward_backward_input": {"data": [1], "loss_fn": "ppo"}}, "data[0]", "must be an? "),
    ({"forward_backward_input": {"data": [good_datum()]}}, "loss_fn", "is missing"),
    ({"forward_backward_input": {"data": [good_datum()], "loss_fn": 1}}, "loss_fn", "must be a valid string"),
]


@pytest.mark.parametrize(("changes", "place", "rule"), BAD_JSON_BODIES)
def test_bad_json_bodies(changes: dict[str, Any], place: str, rule: str) -> None:
    with pytest.raises(RequestInvalid, match=rule) as caught:
        parse_json_request(json_body([good_datum()], **changes))
    assert caught.value.place == place


def test_unknown_dtypes_and_shapes_in_json() -> None:
    item = good_datum()
    item["loss_fn_inputs"]["weights"]["dtype"] = "float64"
    with pytest.raises(RequestInvalid, match="must be 'float32' or 'int64', got 'float64'") as caught:
        parse_json_request(json_body([item]))
    assert caught.value.place == f"{INPUTS}.weights.dtype"
    item["loss_fn_inputs"]["weights"] = sparse([1.0, 2.0], sparse_col_indices=None)
    with pytest.raises(RequestInvalid, match="needs both"):
        parse_json_request(json_body([item]))


def test_bad_protobuf() -> None:
    body = proto_body([good_datum()])
    for cut in (body[:-1], body + b"\xff", b"\x00", b'{"a": 1}'):
        with pytest.raises(RequestInvalid, match="not a whole ForwardBackwardRequest"):
            parse_proto_request(cut)
    with pytest.raises(RequestInvalid, match="2 errors") as caught:
        parse_proto_request(proto_body([good_datum()], model_id="", seq_id=-1))
    assert caught.value.place == "model_id"
    item = datum([1], target_tokens=tensor([1], "unknown"), weights=tensor([1.0]))
    with pytest.raises(RequestInvalid, match="unknown dtype 99"):
        parse_proto_request(proto_body([item]))
    request = pb.ForwardBackwardRequest.FromString(body)
    request.data[0].model_input[0].encoded_text.tokens += b"\x00"
    with pytest.raises(RequestInvalid, match="13 bytes, which is no multiple of 4"):
        parse_proto_request(request.SerializeToString())


@given(st.binary(max_size=100))
@settings(max_examples=100, deadline=None)
def test_protobuf_noise_is_refused_in_words(noise: bytes) -> None:
    with pytest.raises(RequestInvalid):
        parse_proto_request(noise)


@both_wires
def test_every_bad_datum_is_told(parse: Any) -> None:
    bad = datum([1], target_tokens=tensor([1, 2], "int64"), weights=tensor([1.0]))
    with pytest.raises(RequestInvalid, match="1 of 25 errors") as caught:
        parse([good_datum(), *[bad] * 25])
    assert caught.value.place == "data[1].loss_fn_inputs.target_tokens"
    assert "data[20]." in caught.value.message
    assert "data[21]." not in caught.value.message


def test_too_many_datums() -> None:
    many = pb.ForwardBackwardRequest(model_id="m", loss_fn="ppo", data=[pb.Datum()] * (MAX_DATUMS + 1))
    with pytest.raises(RequestInvalid, match="got 65537"):
        parse_proto_request(many.SerializeToString())
    with pytest.raises(RequestInvalid, match="at most 65536 items"):
        parse_json_request(json_body([{}] * (MAX_DATUMS + 1)))
