"""Saving, loading and describing weights."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runs.api.decorators import in_thread
from runs.models import Checkpoint, Operation, SamplingSession, Session, TrainingRun
from runs.services import checkpoints, keys
from runs.services.commits import NewCheckpoint, Result
from tests.api import bodies
from tests.api.client import Actor, error_of, operation, operation_pk, seqs_of
from tests.services import rows
from tests.services.hand_worker import HandWorker


def path_of(checkpoint: Checkpoint) -> str:
    return f"tinker://{checkpoint.run.public_id}/{checkpoint.kind}/{checkpoint.name}"


async def payload_of(pk: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(bytes((await operation(pk)).payload or b""))
    return content


# -- save ---------------------------------------------------------------------------------------------------


async def test_save_weights_is_in_the_log(alice: Actor, run: TrainingRun) -> None:
    body = bodies.save_weights(run, 1, ttl_seconds=3600, overwrite=True, user_metadata={"a": "b"})
    pk = await alice.submit("save_weights", body)
    assert (await operation(pk)).kind == "save_weights"
    stored = await payload_of(pk)
    assert {
        "path": "final",
        "ttl_seconds": 3600,
        "overwrite": True,
        "user_metadata": {"a": "b"},
    }.items() <= stored.items()
    assert await alice.submit("save_weights", body) == pk


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "/etc/passwd", "%2e%2e", "a\\b", "a/b", ".hidden", "..", "", "x" * 129, "a b", "nul\0", "a\u202eb",
        "caf\u00e9", "cafe\u0301", "emoji\U0001f600", "trailing ", "line\n", None, 5, ["a"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["save_weights", "save_weights_for_sampler"])
async def test_a_name_that_cannot_be_a_checkpoints_is_refused(
    alice: Actor, run: TrainingRun, path: str, name: object
) -> None:
    reply = await alice.post(path, {"model_id": run.public_id, "seq_id": 1, "path": name})
    assert "path" in error_of(reply, 422)["detail"] or "NUL" in reply.text
    assert all(state == "failed" for seq, _, state in await seqs_of(run) if seq == 1)


@pytest.mark.parametrize("name", ["final", "step_1000", "000080", "a.b-c_D", "x" * 128, "CON", "a."])
async def test_ordinary_names_are_taken(alice: Actor, run: TrainingRun, name: str) -> None:
    await alice.submit("save_weights", bodies.save_weights(run, 1, path=name))


@pytest.mark.parametrize("ttl", [0, -1, 10**12, 1.5, "3600"])
async def test_a_lifetime_that_cannot_be_is_refused(alice: Actor, run: TrainingRun, ttl: object) -> None:
    reply = await alice.post("save_weights", bodies.save_weights(run, 1, ttl_seconds=ttl))
    assert error_of(reply, 422)["place"] == "ttl_seconds"


async def test_a_named_save_for_the_sampler_is_in_the_log(alice: Actor, run: TrainingRun) -> None:
    pk = await alice.submit("save_weights_for_sampler", bodies.save_for_sampler(run, 1, path="s"))
    assert (await operation(pk)).kind == "save_weights_for_sampler"
    assert (await payload_of(pk))["path"] == "s"


async def test_an_ephemeral_save_sent_again_with_a_later_number_is_the_same_request(
    alice: Actor, run: TrainingRun
) -> None:
    first, *others = [
        await alice.submit(
            "save_weights_for_sampler", bodies.save_for_sampler(run, 1, sampling_session_seq_id=number)
        )
        for number in (0, 1, 2)
    ]
    assert others == [first, first]
    assert (await payload_of(first))["sampling_session_seq_id"] == 0
    named = await alice.post("save_weights_for_sampler", bodies.save_for_sampler(run, 1, path="s"))
    error_of(named, 422)


@pytest.mark.parametrize(
    "changes", [{}, {"path": "s", "sampling_session_seq_id": 0}, {"path": "s", "kind": "inflight"}]
)
async def test_a_save_for_the_sampler_has_one_target(
    alice: Actor, run: TrainingRun, changes: dict[str, Any]
) -> None:
    error_of(await alice.post("save_weights_for_sampler", bodies.save_for_sampler(run, 1, **changes)), 422)


async def test_an_ephemeral_save_can_be_sampled_from_at_once(
    alice: Actor, run: TrainingRun, worker: HandWorker
) -> None:
    pk = await alice.submit(
        "save_weights_for_sampler", bodies.save_for_sampler(run, 1, sampling_session_seq_id=4)
    )
    session_id = f"{run.public_id.partition(':')[0]}:sample:4"
    new = NewCheckpoint(
        kind="sampler_weights",
        name="ephemeral-1",
        directory="checkpoints/ephemeral",
        size_bytes=1,
        is_ephemeral=True,
        sampling_session_seq=4,
    )
    answer = Result(body=json.dumps({"sampling_session_id": session_id}).encode())
    await in_thread(lambda: worker.finish(pk, answer, checkpoint=new))
    assert (await alice.poll(pk)).json() == {"sampling_session_id": session_id}
    session = await SamplingSession.objects.aget(public_id=session_id)
    await alice.submit("asample", bodies.sample(session))
    assert (await alice.get("checkpoints")).json()["checkpoints"] == []


# -- load ---------------------------------------------------------------------------------------------------


async def test_load_weights_names_the_files_and_not_the_secret(
    alice: Actor, run: TrainingRun, checkpoint: Checkpoint
) -> None:
    body = bodies.load_weights(run, 5, path_of(checkpoint), weights_access_token=alice.key)
    pk = await alice.submit("load_weights", body)
    stored = await payload_of(pk)
    assert stored == {"directory": checkpoint.directory, "path": path_of(checkpoint), "optimizer": True}
    assert await alice.submit("load_weights", body) == pk


async def test_a_load_sent_again_is_the_same_though_its_checkpoint_was_saved_anew_or_is_gone(
    alice: Actor, run: TrainingRun, checkpoint: Checkpoint
) -> None:
    body = bodies.load_weights(run, 5, path_of(checkpoint))
    pk = await alice.submit("load_weights", body)
    await Checkpoint.objects.filter(pk=checkpoint.pk).aupdate(directory="checkpoints/newer")
    assert await alice.submit("load_weights", body) == pk
    await Checkpoint.objects.filter(pk=checkpoint.pk).adelete()
    assert await alice.submit("load_weights", body) == pk
    assert (await payload_of(pk))["directory"] == checkpoint.directory
    error_of(await alice.post("load_weights", bodies.load_weights(run, 6, path_of(checkpoint))), 404)


async def test_what_is_still_to_be_saved_cannot_be_loaded(alice: Actor, run: TrainingRun, bob: Actor) -> None:
    own = await in_thread(lambda: rows.make_run(bob.user))
    new = f"tinker://{run.public_id}/weights/final"
    pk = await alice.submit("save_weights", bodies.save_weights(run, 1))
    error = error_of(await alice.post("load_weights", bodies.load_weights(run, 2, new)), 422)
    assert (error["place"], "still to be saved" in error["detail"]) == ("path", True)
    error_of(await bob.post("load_weights", bodies.load_weights(own, 1, new)), 404)  # not his to know
    saved = await in_thread(lambda: rows.make_checkpoint(run, "final"))
    await Operation.objects.filter(pk=pk).aupdate(state="done")
    assert saved.seq == 3
    body = bodies.load_weights(run, 5, path_of(saved))
    await alice.submit("save_weights", bodies.save_weights(run, 6, overwrite=True))
    loaded = await alice.submit("load_weights", body)  # on its way while the save behind it came
    assert await alice.submit("load_weights", body) == loaded
    error_of(await alice.post("load_weights", bodies.load_weights(run, 7, new)), 422)
    other = await in_thread(lambda: rows.make_run(alice.user))
    await alice.submit("load_weights", bodies.load_weights(other, 1, new))  # which knows no order of the two


async def test_a_run_whose_first_request_is_a_load_is_a_fork(alice: Actor, checkpoint: Checkpoint) -> None:
    bare, later = [await in_thread(lambda: rows.make_run(alice.user)) for _ in range(2)]
    await alice.submit("load_weights", bodies.load_weights(bare, 1, path_of(checkpoint)))
    await alice.submit("load_weights", bodies.load_weights(later, 2, path_of(checkpoint)))
    found = TrainingRun.objects.values_list("parent", "parent_step", "parent_path", "parent_seq")
    parentage = {one.pk: await found.aget(pk=one.pk) for one in (bare, later)}
    assert parentage == {
        bare.pk: (checkpoint.run_id, checkpoint.step, path_of(checkpoint), checkpoint.seq),
        later.pk: (None, None, "", None),
    }


@pytest.mark.parametrize(
    ("step", "optimizer", "continues"), [(3, True, True), (3, False, False), (0, True, False)]
)
async def test_a_fork_goes_on_where_its_parent_stood_with_the_optimizers_state(
    alice: Actor, checkpoint: Checkpoint, session: Session, step: int, optimizer: bool, continues: bool
) -> None:
    await Checkpoint.objects.filter(pk=checkpoint.pk).aupdate(step=step)
    path = path_of(checkpoint)
    made = {"session_id": session.public_id, "model_seq_id": 2, "path": path, "optimizer": optimizer}
    bare = await in_thread(lambda: rows.make_run(alice.user))
    pks = [
        operation_pk(await alice.post("load_weights", made)),
        await alice.submit("load_weights", bodies.load_weights(bare, 1, path, optimizer=optimizer)),
    ]
    async for load in Operation.objects.filter(pk__in=pks).select_related("run"):
        assert load.loads_from == checkpoint.directory
        assert load.run is not None
        assert load.run.continues_parent == continues


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_rank": 16}, "the checkpoint has rank 8, this run has 16"),
        ({"train_mlp": False}, "train_mlp=True"),
        ({"base_model": "other"}, "this run trains 'other'"),
    ],
)
async def test_weights_of_another_shape_are_refused_before_they_are_asked_for(
    alice: Actor, checkpoint: Checkpoint, changes: dict[str, Any], reason: str
) -> None:
    run = await in_thread(lambda: rows.make_run(alice.user))
    await TrainingRun.objects.filter(pk=run.pk).aupdate(**changes)
    error = error_of(await alice.post("load_weights", bodies.load_weights(run, 1, path_of(checkpoint))), 422)
    assert reason in error["detail"]
    assert error["place"] == "path"
    await run.arefresh_from_db()
    assert run.parent_path == ""


async def test_sampler_weights_have_no_optimizer_to_load(alice: Actor, run: TrainingRun) -> None:
    sampler = await in_thread(lambda: rows.make_checkpoint(run, kind=Checkpoint.Kind.SAMPLER))
    reply = await alice.post("load_weights", bodies.load_weights(run, 5, path_of(sampler)))
    assert error_of(reply, 422)["place"] == "path"
    await alice.submit("load_weights", bodies.load_weights(run, 6, path_of(sampler), optimizer=False))


async def test_another_users_weights_load_when_published_or_with_their_key(
    alice: Actor, bob: Actor, checkpoint: Checkpoint
) -> None:
    own = await in_thread(lambda: rows.make_run(bob.user))
    error_of(await bob.post("load_weights", bodies.load_weights(own, 1, path_of(checkpoint))), 404)
    with_token = bodies.load_weights(own, 2, path_of(checkpoint), weights_access_token=alice.key)
    assert (await payload_of(await bob.submit("load_weights", with_token)))[
        "directory"
    ] == checkpoint.directory
    wrong = bodies.load_weights(own, 3, path_of(checkpoint), weights_access_token="tml-wrong")
    error_of(await bob.post("load_weights", wrong), 401)
    await in_thread(lambda: checkpoints.set_public(checkpoint, is_public=True))
    await bob.submit("load_weights", bodies.load_weights(own, 4, path_of(checkpoint)))


async def test_a_revoked_key_opens_no_weights(alice: Actor, bob: Actor, checkpoint: Checkpoint) -> None:
    own = await in_thread(lambda: rows.make_run(bob.user))
    key, secret = await in_thread(lambda: keys.create_key(alice.user, "to lend"))
    await in_thread(lambda: keys.revoke_key(alice.user, key.pk))
    body = bodies.load_weights(own, 1, path_of(checkpoint), weights_access_token=secret)
    error_of(await bob.post("load_weights", body), 401)


async def test_a_run_is_made_from_a_checkpoint(
    alice: Actor, checkpoint: Checkpoint, session: Session
) -> None:
    body = {
        "session_id": session.public_id,
        "model_seq_id": 2,
        "path": path_of(checkpoint),
        "optimizer": True,
    }
    reply = await alice.post("load_weights", body)
    run_id = f"{session.public_id}:train:2"
    assert reply.json()["model_id"] == run_id
    run = await TrainingRun.objects.aget(public_id=run_id)
    assert (run.lora_rank, run.lora_seed) == (checkpoint.run.lora_rank, checkpoint.run.lora_seed)
    row = await operation(operation_pk(reply))
    assert (row.seq, row.kind) == (0, "create_model")
    assert (await payload_of(row.pk))["load"]["directory"] == checkpoint.directory
    assert (run.parent_id, run.parent_step, run.parent_path) == (
        checkpoint.run_id,
        checkpoint.step,
        path_of(checkpoint),
    )
    await Checkpoint.objects.filter(pk=checkpoint.pk).aupdate(directory="checkpoints/newer")
    assert operation_pk(await alice.post("load_weights", body)) == row.pk
    await Checkpoint.objects.filter(pk=checkpoint.pk).adelete()
    assert operation_pk(await alice.post("load_weights", body)) == row.pk
    error_of(await alice.post("load_weights", body | {"optimizer": False}), 404)
    assert (await alice.post("get_info", {"model_id": run_id})).json()["lora_rank"] == run.lora_rank
    await alice.submit("optim_step", bodies.optim_step(run, 1))


async def test_a_run_is_not_made_from_another_base_model(
    alice: Actor, checkpoint: Checkpoint, session: Session
) -> None:
    body = {
        "session_id": session.public_id,
        "model_seq_id": 2,
        "path": path_of(checkpoint),
        "base_model": "no/model",
    }
    assert error_of(await alice.post("load_weights", body), 422)["place"] == "base_model"
    assert not await TrainingRun.objects.filter(session=session).aexists()


@pytest.mark.parametrize(
    "changes", [{}, {"model_id": "m"}, {"seq_id": 1}, {"session_id": "s"}, {"model_id": "m", "seq_id": 1, "session_id": "s", "model_seq_id": 1}]
)  # fmt: skip
async def test_a_load_has_one_target(alice: Actor, checkpoint: Checkpoint, changes: dict[str, Any]) -> None:
    error_of(await alice.post("load_weights", {"path": path_of(checkpoint)} | changes), 422)


# -- weights_info -----------------------------------------------------------------------------------------------


async def test_weights_info_tells_real_values(alice: Actor, checkpoint: Checkpoint) -> None:
    reply = await alice.post("weights_info", {"tinker_path": path_of(checkpoint)})
    assert reply.json() == {
        "base_model": rows.BASE_MODEL,
        "is_lora": True,
        "lora_rank": 8,
        "train_unembed": True,
        "train_mlp": True,
        "train_attn": True,
    }


async def test_weights_info_of_another_user_needs_publishing(
    alice: Actor, bob: Actor, checkpoint: Checkpoint
) -> None:
    body = {"tinker_path": path_of(checkpoint)}
    error_of(await bob.post("weights_info", body), 404)
    address = f"training_runs/{checkpoint.run.public_id}/checkpoints/weights/one/publish"
    assert (await alice.post(address)).status_code == 204
    assert (await bob.post("weights_info", body)).json()["lora_rank"] == 8
    assert (await alice.request("DELETE", address)).status_code == 204
    error_of(await bob.post("weights_info", body), 404)


@pytest.mark.parametrize(
    "path",
    ["", "tinker://", "tinker://a/b/c", "tinker://a/weights", "tinker://a/weights/b/c", "http://a/weights/b", "tinker://a/weights/..", None, 5],
)  # fmt: skip
async def test_what_is_no_path_is_refused(alice: Actor, path: object) -> None:
    assert error_of(await alice.post("weights_info", {"tinker_path": path}), 422)["place"] == "tinker_path"
