"""Training calls: what is submitted is in the log, once, in order, and refused requests take up their seq."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pytest_django.fixtures import Settings

from runs.api.decorators import in_thread
from runs.models import Operation, Session, TrainingRun, Worker
from runs.schemas import forward_backward as fb
from runs.services import claims, operations
from runs.services.commits import Result
from tests.api import bodies
from tests.api.client import Actor, error_of, operation, operation_pk, seqs_of
from tests.schemas.batches import datum, good_datum, proto_body, rl_datum, tensor
from tests.services import rows
from tests.services.hand_worker import HandWorker

PROTO = {"content_type": "application/x-protobuf"}


# -- create_model, get_info, unload_model ------------------------------------------------------------


async def test_create_model_makes_a_run(alice: Actor, session: Session) -> None:
    content = (await alice.post("create_model", bodies.create_model(session.public_id))).json()
    assert content["model_id"] == f"{session.public_id}:train:0"
    run = await TrainingRun.objects.aget(public_id=content["model_id"])
    assert (run.owner_id, run.base_model, run.lora_rank, run.lora_seed) == (
        alice.user.pk,
        rows.BASE_MODEL,
        8,
        1,
    )
    assert run.user_metadata == {"team": "a"}
    row = await operation(int(content["request_id"].removeprefix("op-")))
    assert (row.run_id, row.seq, row.kind, row.state) == (run.pk, 0, "create_model", "queued")


async def test_create_model_again_is_the_same_request(alice: Actor, session: Session) -> None:
    body = bodies.create_model(session.public_id)
    replies = await asyncio.gather(*(alice.post("create_model", body) for _ in range(10)))
    assert len({reply.text for reply in replies}) == 1
    assert await TrainingRun.objects.filter(session=session).acount() == 1


async def test_create_model_with_the_defaults_of_the_client(alice: Actor, session: Session) -> None:
    body = {"session_id": session.public_id, "model_seq_id": 3, "base_model": rows.BASE_MODEL}
    run_id = (await alice.post("create_model", body)).json()["model_id"]
    run = await TrainingRun.objects.aget(public_id=run_id)
    assert (run.lora_rank, run.train_attn, run.train_mlp, run.train_unembed) == (32, True, True, True)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"base_model": "no/model"}, "base_model"),
        ({"lora_config": {"rank": 65}}, "lora_config.rank"),
        ({"lora_config": {"rank": 0}}, "lora_config.rank"),
        ({"lora_config": {"rank": 1.5}}, "lora_config.rank"),
        ({"lora_config": {"rank": 10**6}}, "lora_config.rank"),
        ({"lora_config": {"train_attn": False, "train_mlp": False, "train_unembed": False}}, "lora_config"),
        ({"lora_config": {"seed": 2**63}}, "lora_config.seed"),
        ({"model_seq_id": -1}, "model_seq_id"),
        ({"model_seq_id": 2**40}, "model_seq_id"),
        ({"model_seq_id": True}, "model_seq_id"),
        ({"optimizer_config": {"type": "dimuon"}}, "optimizer_config"),
        ({"user_metadata": {"k": "x" * 20_000}}, "user_metadata"),
        ({"session_id": None}, "session_id"),
        ({"session_id": ""}, "session_id"),
    ],
)
async def test_create_model_refuses_what_cannot_be(
    alice: Actor, session: Session, changes: dict[str, Any], place: str
) -> None:
    reply = await alice.post("create_model", bodies.create_model(session.public_id) | changes)
    assert error_of(reply, 422)["place"] == place
    assert not await TrainingRun.objects.filter(session=session).aexists()
    assert (await alice.post("create_model", bodies.create_model(session.public_id))).status_code == 200


async def test_create_model_refuses_another_run_under_the_number(alice: Actor, session: Session) -> None:
    await alice.post("create_model", bodies.create_model(session.public_id))
    other = bodies.create_model(session.public_id, lora_config={"rank": 4})
    assert error_of(await alice.post("create_model", other), 422)["place"] == "model_seq_id"


async def test_get_info_tells_what_a_client_needs(alice: Actor, run: TrainingRun) -> None:
    content = (await alice.post("get_info", {"model_id": run.public_id, "type": "get_info"})).json()
    assert content["model_id"] == run.public_id
    assert content["model_name"] == content["model_data"]["model_name"] == rows.BASE_MODEL
    assert content["model_data"]["arch"] == "tiny"
    assert content["model_data"]["tokenizer_id"]
    assert (content["is_lora"], content["lora_rank"], content["type"]) == (True, 8, "get_info")


async def test_unload_model_comes_after_what_was_sent_and_once(alice: Actor, run: TrainingRun) -> None:
    await alice.submit("optim_step", bodies.optim_step(run, 1))
    first = await alice.submit("unload_model", {"model_id": run.public_id})
    assert await alice.submit("unload_model", {"model_id": run.public_id}) == first
    assert [seq for seq, kind, _ in await seqs_of(run) if kind == "unload_model"] == [2]


# -- forward, forward_backward, optim_step --------------------------------------------------------------


async def test_forward_backward_is_in_the_log_before_the_answer(alice: Actor, run: TrainingRun) -> None:
    body = bodies.forward_backward(run, 1, data=[good_datum(3), good_datum(4)])
    reply = await alice.post("forward_backward", body)
    assert reply.json()["model_id"] == run.public_id
    row = await operation(operation_pk(reply))
    assert (row.seq, row.kind, row.state, row.num_tokens) == (1, "forward_backward", "queued", 7)
    payload = fb.from_bytes(bytes(row.payload or b""))
    assert [array.tokens.tolist() for array in payload.data] == [[1, 2, 3], [1, 2, 3, 4]]
    assert not payload.forward_only


async def test_forward_is_marked_as_such_on_both_ways(alice: Actor, run: TrainingRun) -> None:
    old = await alice.submit("forward", bodies.forward(run, 1))
    new = await alice.post(
        "forward_backward",
        proto_body([good_datum()], model_id=run.public_id, seq_id=2, forward_only=True),
        **PROTO,
    )
    for pk in (old, operation_pk(new)):
        row = await operation(pk)
        assert row.kind == Operation.Kind.FORWARD
        assert fb.from_bytes(bytes(row.payload or b"")).forward_only


async def test_json_and_protobuf_are_the_same_request(alice: Actor, run: TrainingRun) -> None:
    first = await alice.submit("forward_backward", bodies.forward_backward(run, 1))
    body = proto_body([good_datum()], model_id=run.public_id, seq_id=1)
    assert operation_pk(await alice.post("forward_backward", body, **PROTO)) == first


async def test_optim_step_is_in_the_log(alice: Actor, run: TrainingRun) -> None:
    pk = await alice.submit("optim_step", bodies.optim_step(run, 1, learning_rate=0.01))
    row = await operation(pk)
    stored = json.loads(bytes(row.payload or b""))
    assert stored["adam_params"]["learning_rate"] == 0.01


async def test_fifty_equal_requests_at_once_are_one(alice: Actor, run: TrainingRun) -> None:
    body = bodies.forward_backward(run, 1)
    replies = await asyncio.gather(*(alice.post("forward_backward", body) for _ in range(50)))
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.json()["request_id"] for reply in replies}) == 1
    assert len(await seqs_of(run)) == 2


async def test_another_body_under_the_same_seq_is_422_and_the_first_stands(
    alice: Actor, run: TrainingRun
) -> None:
    first = await alice.submit("optim_step", bodies.optim_step(run, 1, learning_rate=0.1))
    for path, body in (
        ("optim_step", bodies.optim_step(run, 1, learning_rate=0.2)),
        ("forward_backward", bodies.forward_backward(run, 1)),
        ("save_weights", bodies.save_weights(run, 1)),
    ):
        error = error_of(await alice.post(path, body), 422)
        assert (error["code"], error["place"]) == ("sequence_conflict", "seq_id 1")
    assert await alice.submit("optim_step", bodies.optim_step(run, 1, learning_rate=0.1)) == first
    assert await seqs_of(run) == [(0, "create_model", "queued"), (1, "optim_step", "queued")]


async def test_chunks_are_acknowledged_in_any_order(alice: Actor, run: TrainingRun) -> None:
    for seq in (2, 3, 1):
        await alice.submit("forward_backward", bodies.forward_backward(run, seq))
    await alice.submit("optim_step", bodies.optim_step(run, 4))
    assert [seq for seq, _, state in await seqs_of(run) if state == "queued"] == [0, 1, 2, 3, 4]


async def test_a_large_payload_goes_to_storage_and_to_the_worker(
    alice: Actor, run: TrainingRun, settings: Settings, worker: HandWorker
) -> None:
    settings.INLINE_PAYLOAD_BYTES = 1000
    body = bodies.forward_backward(run, 1, data=[good_datum(1000)])
    pk = await alice.submit("forward_backward", body)
    assert await alice.submit("forward_backward", body) == pk
    row = await operation(pk)
    assert (row.payload, row.num_tokens) == (None, 1000)
    (taken,) = await in_thread(lambda: claims.take_operations(worker.row, {run.pk: 0}, limit=1))
    assert fb.from_bytes(taken.payload).data[0].tokens.tolist() == list(range(1, 1001))


async def test_a_run_that_is_far_behind_asks_to_wait(alice: Actor, run: TrainingRun) -> None:
    reply = await alice.post("optim_step", bodies.optim_step(run, operations.MAX_QUEUED_PER_RUN + 5))
    assert error_of(reply, 429)["code"] == "rate_limited"
    assert reply.headers["retry-after"] == "1"


async def test_a_run_goes_on_once_its_base_model_can_be_loaded_again(
    alice: Actor, run: TrainingRun, session: Session, gpu_worker: Worker
) -> None:
    await in_thread(lambda: rows.report_base_model(gpu_worker, error="the folder is not mounted"))
    try:
        pk = await alice.submit("forward_backward", bodies.forward_backward(run, 1))
        assert "the folder is not mounted" in (await alice.poll(pk, x_stainless_read_timeout="1")).text
        new = bodies.create_model(session.public_id)
        assert error_of(await alice.post("create_model", new), 422)["place"] == "base_model"
    finally:
        await in_thread(lambda: rows.report_base_model(gpu_worker))
    assert await seqs_of(run) == [(0, "create_model", "queued"), (1, "forward_backward", "queued")]


async def test_a_closed_run_takes_no_more_training(alice: Actor, run: TrainingRun) -> None:
    await TrainingRun.objects.filter(pk=run.pk).aupdate(state=TrainingRun.State.CLOSED)
    error = error_of(await alice.post("forward_backward", bodies.forward_backward(run, 1)), 422)
    assert error["place"] == "model_id"


# -- refused requests -------------------------------------------------------------------------------------

REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    (
        "token",
        "forward_backward",
        {"data": [datum([5000], target_tokens=tensor([1], "int64"), weights=tensor([1.0]))]},
        "data[0].model_input[0]",
    ),
    (
        "length",
        "forward_backward",
        {"data": [datum([1, 2], target_tokens=tensor([1, 2], "int64"), weights=tensor([1.0]))]},
        "data[0].loss_fn_inputs.weights",
    ),
    ("loss", "forward_backward", {"loss_fn": "nonsense"}, "loss_fn"),
    (
        "negative",
        "forward_backward",
        {"data": [rl_datum(weights=tensor([-1.0, 1.0]))], "loss_fn": "ppo"},
        "data[0].loss_fn_inputs.weights[0]",
    ),
    ("empty", "forward_backward", {"data": []}, "data"),
]


@pytest.mark.parametrize(
    ("changes", "place"), [case[2:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
@pytest.mark.parametrize("wire", ["json", "proto"])
async def test_a_refused_batch_takes_up_its_seq_and_the_next_one_works(
    alice: Actor, run: TrainingRun, worker: HandWorker, changes: dict[str, Any], place: str, wire: str
) -> None:
    if wire == "json":
        reply = await alice.post("forward_backward", bodies.forward_backward(run, 1, **changes))
    else:
        fields = {"data": [good_datum()], "loss_fn": "cross_entropy"} | changes
        body = proto_body(fields["data"], str(fields["loss_fn"]), model_id=run.public_id, seq_id=1)
        reply = await alice.post("forward_backward", body, **PROTO)
    assert error_of(reply, 422)["place"] == place
    await follows(alice, run, worker)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("optim_step", {"adam_params": {"learning_rate": -1.0}}),
        ("optim_step", {"adam_params": {"learning_rate": float("nan")}}),
        ("optim_step", {"adam_params": None}),
        ("optim_step", {}),
        ("save_weights", {"path": "../evil"}),
        ("save_weights_for_sampler", {"path": None}),
        ("load_weights", {"path": "tinker://no/weights/such"}),
        ("load_weights", {"path": "nonsense"}),
        ("load_weights", {"path": "tinker://no/weights/such", "weights_access_token": "tml-wrong"}),
        ("forward", {}),
    ],
)
async def test_any_refused_request_takes_up_its_seq(
    alice: Actor, run: TrainingRun, worker: HandWorker, path: str, body: dict[str, Any]
) -> None:
    reply = await alice.post(path, {"model_id": run.public_id, "seq_id": 1} | body)
    assert reply.status_code in (401, 404, 422)
    error_of(reply, reply.status_code)
    await follows(alice, run, worker)
    again = await alice.post(path, {"model_id": run.public_id, "seq_id": 1} | body)
    assert again.text == reply.text


@pytest.mark.parametrize("path", ["save_weights_external", "create_custom_loss", "odd%0Apath"])
async def test_an_operation_that_is_not_served_takes_up_its_seq(
    alice: Actor, run: TrainingRun, worker: HandWorker, path: str
) -> None:
    body = {"model_id": run.public_id, "path": "e-1", "seq_id": 1, "type": path}
    reply = await alice.post(path, body)
    error = error_of(reply, 404)
    if path == "save_weights_external":
        assert "save_state" in error["detail"]
        assert "/rest/v1/runs/" in error["detail"]
    assert (await alice.post(path, body)).text == reply.text
    await follows(alice, run, worker)
    conflict = error_of(await alice.post("optim_step", bodies.optim_step(run, 1)), 422)
    assert conflict["detail"].startswith("seq_id 1: already holds another request")


async def test_a_call_of_mints_own_that_is_not_served_takes_up_no_number(
    alice: Actor, run: TrainingRun
) -> None:
    body = {"model_id": run.public_id, "seq_id": 1, "data": []}
    error_of(await alice.post("mint/forward_backward_reverse_kl", body), 404)
    assert await seqs_of(run) == [(0, "create_model", "queued")]


@pytest.mark.parametrize("body", [b"", b"\xff", b"[1]", b'{"model_id": 3}', b"--x\r\n"])
async def test_whatever_comes_to_an_address_that_is_none_is_404(alice: Actor, body: bytes) -> None:
    assert error_of(await alice.post("nothing", body), 404)["detail"] == "there is no such endpoint"


async def follows(alice: Actor, run: TrainingRun, worker: HandWorker) -> None:
    """Check that seq 1 was taken up and that seq 2 is accepted and reached."""
    refused = await Operation.objects.aget(run=run, seq=1)
    assert (refused.state, refused.error_category, refused.payload) == ("failed", "user", None)
    assert refused.error
    assert (await alice.poll(refused.pk)).json() == {"error": refused.error, "category": "user"}
    following = await alice.submit("optim_step", bodies.optim_step(run, 2))
    await in_thread(lambda: worker.finish(following, Result(body=b'{"metrics":{}}')))
    assert (await alice.poll(following)).json() == {"metrics": {}}


async def test_a_refused_request_of_somebody_else_takes_up_nothing(bob: Actor, run: TrainingRun) -> None:
    error_of(await bob.post("optim_step", {"model_id": run.public_id, "seq_id": 1}), 422)
    error_of(await bob.post("forward_backward", bodies.forward_backward(run, 1, data=[])), 422)
    assert await seqs_of(run) == [(0, "create_model", "queued")]


@pytest.mark.parametrize("model_id", [None, 5, "", "\0", "x" * 300, ["a"]])
async def test_a_request_for_no_run_at_all_is_refused(alice: Actor, model_id: object) -> None:
    body = {"model_id": model_id, "seq_id": 1, "adam_params": {}}
    reply = await alice.post("optim_step", body)
    assert "model_id" in error_of(reply, 422)["detail"] or "NUL" in reply.text
