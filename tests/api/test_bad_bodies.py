"""Bodies that are no JSON, no protobuf, or nothing a run can train on: refused quickly, at their place, for good."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runs.models import Operation, TrainingRun
from tests.api import bodies
from tests.api.client import Actor, Stopwatch, error_of
from tests.schemas.batches import datum, good_datum, proto_body, tensor, two_dimensional
from tests.services import rows

QUICK_S = 1.0
INPUTS = "data[0].loss_fn_inputs"

NO_JSON: list[tuple[str, bytes, str]] = [
    ("empty", b"", "the body is empty"),
    ("blank", b" \n ", "the body is empty"),
    ("syntax", b'{"a": 1,}', "line 1, column 9"),
    ("cut off", b'{"model_id": "x', "not valid JSON"),
    ("list", b"[1, 2]", "must be a JSON object"),
    ("number", b"7", "must be a JSON object"),
    ("NaN", b'{"a": NaN}', "NaN is not a JSON number"),
    ("Infinity", b'{"a": -Infinity}', "-Infinity is not a JSON number"),
    ("1e999", b'{"a": 1e999}', "too large for a number"),
    ("digits", b'{"a": ' + b"9" * 5000 + b"}", "5000 characters"),
    ("twice", b'{"a": 1, "a": 2}', "the key 'a' twice"),
    ("deep", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 64 levels"),
    ("surrogate", b'{"a": "\\ud800"}', "half a surrogate pair"),
    ("NUL", b'{"a": "\\u0000"}', "NUL"),
    ("BOM", b"\xef\xbb\xbf{}", "byte order mark"),
    ("UTF-16", '{"a": 1}'.encode("utf-16"), "UTF-16"),
    ("Latin-1", b'{"a": "\xe9"}', "not valid UTF-8"),
    ("protobuf", proto_body([good_datum()]), ""),
]


@pytest.mark.parametrize(
    ("body", "message"), [case[1:] for case in NO_JSON], ids=[case[0] for case in NO_JSON]
)
@pytest.mark.parametrize(
    "path", ["create_session", "optim_step", "forward_backward", "asample", "retrieve_future"]
)
async def test_what_is_no_json_is_refused(alice: Actor, path: str, body: bytes, message: str) -> None:
    num_rows = await Operation.objects.acount()
    with Stopwatch() as watch:
        reply = await alice.post(path, body)
    assert message in error_of(reply, 422)["detail"]
    assert watch.elapsed_s < QUICK_S
    assert await Operation.objects.acount() == num_rows


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff" * 50, b"{}", proto_body([good_datum()])[:-3]],
    ids=["empty", "ones", "JSON", "cut short"],
)
async def test_what_is_no_protobuf_is_refused(alice: Actor, body: bytes) -> None:
    reply = await alice.post("forward_backward", body, content_type="application/x-protobuf")
    error_of(reply, 422)


async def test_a_number_the_client_wrote_as_nan_still_takes_up_its_seq(
    alice: Actor, run: TrainingRun
) -> None:
    body = json.dumps(bodies.optim_step(run, 1, learning_rate=float("nan"))).encode()
    assert b"NaN" in body
    assert error_of(await alice.post("optim_step", body), 422)["place"].startswith("line 1, column 1")
    assert (await Operation.objects.aget(run=run, seq=1)).state == Operation.State.FAILED


def weights(data: list[Any], **rest: Any) -> list[dict[str, Any]]:
    return [datum([1, 2], target_tokens=tensor([1, 2], "int64"), weights=tensor(data, **rest))]


def targets(data: list[Any], **rest: Any) -> list[dict[str, Any]]:
    return [datum([1, 2], target_tokens=tensor(data, "int64", **rest), weights=tensor([1.0, 1.0]))]


BAD_DATA: list[tuple[list[Any], str]] = [
    (weights([1.0, 1.0], shape=[3]), f"{INPUTS}.weights"),
    (weights([1.0, 1.0], shape=[-2]), f"{INPUTS}.weights.shape[0]"),
    (weights([1.0, 1.0], shape=[2**63]), f"{INPUTS}.weights.shape[0]"),
    (weights([1.0, True]), f"{INPUTS}.weights[1]"),
    (weights([1.0, "1"]), f"{INPUTS}.weights[1]"),
    (weights([1.0, None]), f"{INPUTS}.weights[1]"),
    (weights([1.0, 1e300]), f"{INPUTS}.weights[1]"),
    (weights([1, 1], dtype="int64"), f"{INPUTS}.weights"),
    (weights([1.0, 1.0], dtype="float16"), f"{INPUTS}.weights.dtype"),
    (weights([1.0, 1.0, 1.0]), f"{INPUTS}.weights"),
    (weights([]), f"{INPUTS}.weights"),
    (targets([1, 2.5]), f"{INPUTS}.target_tokens[1]"),
    (targets([1, 2**63]), f"{INPUTS}.target_tokens[1]"),
    (targets([1, 2048]), f"{INPUTS}.target_tokens[1]"),
    (targets([1, -1]), f"{INPUTS}.target_tokens[1]"),
    ([good_datum(), datum([1, 2047, 2048], target_tokens=tensor([1, 2, 3], "int64"), weights=tensor([1.0] * 3))], "data[1].model_input[2]"),
    ([datum([-1], target_tokens=tensor([1], "int64"), weights=tensor([1.0]))], "data[0].model_input.chunks[0].tokens[0]"),
    ([datum([], target_tokens=tensor([], "int64"), weights=tensor([]))], "data[0].model_input"),
    ([good_datum(2047) | {"model_input": {"chunks": []}}], "data[0].model_input.chunks"),
    ([{"model_input": {"chunks": [{"type": "image", "data": "", "format": "png"}]}, "loss_fn_inputs": {}}], "data[0].model_input.chunks[0]"),
    ([datum([1])], INPUTS),
    ([two_dimensional(weights=tensor([1.0, 1.0]))], f"{INPUTS}.weights"),
    ([5], "data[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "place"), BAD_DATA)
async def test_a_bad_batch_is_refused_at_its_place(
    alice: Actor, run: TrainingRun, data: list[Any], place: str
) -> None:
    with Stopwatch() as watch:
        reply = await alice.post("forward_backward", bodies.forward_backward(run, 1, data=data))
    error = error_of(reply, 422)
    assert error["place"].removeprefix("forward_backward_input.") == place
    assert watch.elapsed_s < QUICK_S
    assert await Operation.objects.filter(run=run).acount() == 2  # the creation, and the seq taken up
    await alice.submit("forward_backward", bodies.forward_backward(run, 2))


async def test_a_datum_as_long_as_the_context_is_taken_and_a_longer_one_is_not(
    alice: Actor, run: TrainingRun
) -> None:
    def long(num_tokens: int) -> list[dict[str, Any]]:
        ones = [1] * num_tokens
        return [datum(ones, target_tokens=tensor(ones, "int64"), weights=tensor([1.0] * num_tokens))]

    await alice.submit("forward_backward", bodies.forward_backward(run, 1, data=long(rows.MAX_CONTEXT)))
    reply = await alice.post(
        "forward_backward", bodies.forward_backward(run, 2, data=long(rows.MAX_CONTEXT + 1))
    )
    error = error_of(reply, 422)
    assert error["place"] == "data[0].model_input"
    assert "2049 tokens, but the context length of the base model is 2048" in error["detail"]


async def test_many_errors_are_told_together_and_counted(alice: Actor, run: TrainingRun) -> None:
    bad = datum([1, 2], target_tokens=tensor([1], "int64"), weights=tensor([1.0]))
    error = error_of(
        await alice.post("forward_backward", bodies.forward_backward(run, 1, data=[bad] * 50)), 422
    )
    assert "1 of 50 errors" in error["detail"]
    assert "data[19]" in error["detail"]
    assert "data[20]" not in error["detail"]


async def test_zero_and_negative_weights_are_allowed_where_a_loss_defines_them(
    alice: Actor, run: TrainingRun
) -> None:
    for seq, values in enumerate(([0.0, 0.0], [-1.0, 1.0]), start=1):
        await alice.submit("forward_backward", bodies.forward_backward(run, seq, data=weights(values)))


BAD_ADAM: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": -1e-4}, "learning_rate"),
    ({"learning_rate": 1e9}, "learning_rate"),
    ({"learning_rate": "0.1"}, "learning_rate"),
    ({"learning_rate": None}, "learning_rate"),
    ({"beta1": 1.0}, "beta1"),
    ({"beta2": 1.5}, "beta2"),
    ({"beta1": -0.1}, "beta1"),
    ({"eps": 0}, "eps"),
    ({"eps": -1e-8}, "eps"),
    ({"weight_decay": -0.1}, "weight_decay"),
]


@pytest.mark.parametrize(("adam", "name"), BAD_ADAM)
async def test_a_bad_optimizer_setting_is_refused_by_name(
    alice: Actor, run: TrainingRun, adam: dict[str, Any], name: str
) -> None:
    reply = await alice.post("optim_step", bodies.optim_step(run, 1, **adam))
    assert error_of(reply, 422)["place"] == f"adam_params.{name}"
    await alice.submit("optim_step", bodies.optim_step(run, 2))


@pytest.mark.parametrize("seq", [-1, 2**63, 1.5, "1", None, True])
async def test_a_seq_that_is_none_takes_up_nothing(alice: Actor, run: TrainingRun, seq: object) -> None:
    reply = await alice.post("optim_step", bodies.optim_step(run, 0) | {"seq_id": seq})
    assert error_of(reply, 422)["place"] == "seq_id"
    assert await Operation.objects.filter(run=run).acount() == 1


async def test_values_are_shown_short_and_escaped(alice: Actor, run: TrainingRun) -> None:
    body = bodies.forward_backward(run, 1, loss_fn="<script>\u202e" + "x" * 5000)
    detail = error_of(await alice.post("forward_backward", body), 422)["detail"]
    assert "\u202e" not in detail
    assert len(detail) < 400
