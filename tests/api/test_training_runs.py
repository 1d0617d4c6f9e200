"""Listing and managing runs and checkpoints, as the REST client and the command line tool do it."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from django.core import signing
from django.core.files.storage import default_storage
from django.db.backends.utils import CursorWrapper

from runs.api.decorators import Reply, in_thread, respond
from runs.models import Checkpoint, TrainingRun
from runs.services import archives
from tests.api.client import Actor, error_of, send
from tests.services import rows


def address(checkpoint: Checkpoint, tail: str = "") -> str:
    return f"training_runs/{checkpoint.run.public_id}/checkpoints/{checkpoint.kind}/{checkpoint.name}{tail}"


async def test_a_run_is_described(alice: Actor, run: TrainingRun, checkpoint: Checkpoint) -> None:
    content = (await alice.get(f"training_runs/{run.public_id}?access_scope=owned")).json()
    assert content["training_run_id"] == run.public_id
    assert (content["base_model"], content["model_owner"]) == (rows.BASE_MODEL, alice.user.username)
    assert (content["is_lora"], content["lora_rank"], content["corrupted"]) == (True, 8, False)
    assert datetime.fromisoformat(content["last_request_time"]).tzinfo
    assert content["last_checkpoint"]["checkpoint_id"] == "weights/one"
    assert content["last_sampler_checkpoint"] is None
    await TrainingRun.objects.filter(pk=run.pk).aupdate(state=TrainingRun.State.FAILED)
    assert (await alice.get(f"training_runs/{run.public_id}")).json()["corrupted"] is True


async def test_runs_are_listed_in_pages_newest_first(alice: Actor) -> None:
    runs = await in_thread(lambda: [rows.make_run(alice.user) for _ in range(5)])
    newest_first = [run.public_id for run in reversed(runs)]
    seen: list[str] = []
    for offset in (0, 2, 4, 6):
        content = (await alice.get(f"training_runs?limit=2&offset={offset}&access_scope=owned")).json()
        assert content["cursor"] == {"offset": offset, "limit": 2, "total_count": 5}
        seen += [run["training_run_id"] for run in content["training_runs"]]
    assert seen == newest_first
    everything = (await alice.get("training_runs")).json()
    assert everything["cursor"] == {"offset": 0, "limit": 20, "total_count": 5}


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what is asked of the database in any thread, but what a new connection asks."""
    asked: list[str] = []
    execute = CursorWrapper.execute

    def noting(cursor: CursorWrapper, sql: Any, params: Any = None) -> Any:
        if '"runs_' in str(sql):
            asked.append(str(sql))
        return execute(cursor, sql, params)

    monkeypatch.setattr(CursorWrapper, "execute", noting)
    return asked


async def test_a_long_list_takes_no_more_queries_than_a_short_one(alice: Actor, queries: list[str]) -> None:
    def make_runs(number: int) -> None:
        for _ in range(number):
            run = rows.make_run(alice.user)
            for kind in Checkpoint.Kind.values:
                for name in ("first", "last"):
                    rows.make_checkpoint(run, name, kind=kind)

    await alice.get("training_runs")  # the key is known from now on
    counts = []
    for number in (2, 18):
        await in_thread(lambda number=number: make_runs(number))  # type: ignore[misc]
        queries.clear()
        listed = (await alice.get("training_runs")).json()["training_runs"]
        counts.append(len(queries))
    assert counts[1] <= counts[0] + 1  # now and then the key's last use is entered, too
    assert len(listed) == 20
    assert {run["last_checkpoint"]["checkpoint_id"] for run in listed} == {"weights/last"}
    assert {run["last_sampler_checkpoint"]["checkpoint_id"] for run in listed} == {"sampler_weights/last"}
    assert {run["model_owner"] for run in listed} == {alice.user.username}


async def test_many_checkpoints_of_a_run_come_in_pages(alice: Actor, run: TrainingRun) -> None:
    for name in "abc":
        await in_thread(lambda name=name: rows.make_checkpoint(run, name))  # type: ignore[misc]
    path = f"training_runs/{run.public_id}/checkpoints?limit=2"
    for offset, names in ((0, "cb"), (2, "a")):
        page = (await alice.get(f"{path}&offset={offset}")).json()
        assert [row["checkpoint_id"] for row in page["checkpoints"]] == [f"weights/{name}" for name in names]
        assert page["cursor"] == {"offset": offset, "limit": 2, "total_count": 3}


@pytest.mark.parametrize("path", ["training_runs", "checkpoints", "sessions"])
@pytest.mark.parametrize(
    ("query", "place"),
    [
        ("limit=-1", "limit"),
        ("limit=0", "limit"),
        ("limit=1000000000", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("limit=abc", "limit"),
        ("limit=%C2%B2", "limit"),
        ("offset=-1", "offset"),
        ("offset=99999999999", "offset"),
        ("offset=1%20OR%201", "offset"),
        ("offset=%00", "offset"),
    ],
)
async def test_a_page_that_cannot_be_is_refused(alice: Actor, path: str, query: str, place: str) -> None:
    assert error_of(await alice.get(f"{path}?{query}"), 422)["place"] == place


async def test_checkpoints_are_listed_of_a_run_and_of_a_user(
    alice: Actor, bob: Actor, run: TrainingRun
) -> None:
    for name in ("a", "b"):
        await in_thread(lambda name=name: rows.make_checkpoint(run, name))  # type: ignore[misc]
    other = await in_thread(
        lambda: rows.make_checkpoint(rows.make_run(alice.user), "c", kind="sampler_weights")
    )
    of_run = (await alice.get(f"training_runs/{run.public_id}/checkpoints")).json()
    assert of_run["cursor"] is None
    assert [row["checkpoint_id"] for row in of_run["checkpoints"]] == ["weights/b", "weights/a"]
    of_user = (await alice.get("checkpoints?limit=2&offset=0")).json()
    assert of_user["cursor"] == {"offset": 0, "limit": 2, "total_count": 3}
    first = of_user["checkpoints"][0]
    assert first == {
        "checkpoint_id": "sampler_weights/c",
        "checkpoint_type": "sampler",
        "time": other.created_at.isoformat(),
        "tinker_path": f"tinker://{other.run.public_id}/sampler_weights/c",
        "size_bytes": 100,
        "public": False,
        "expires_at": None,
        "user_metadata": None,
    }
    assert (await bob.get("checkpoints")).json()["checkpoints"] == []


async def test_publishing_can_be_repeated(alice: Actor, checkpoint: Checkpoint) -> None:
    path = address(checkpoint, "/publish")
    for method, is_public in (("POST", True), ("POST", True), ("DELETE", False), ("DELETE", False)):
        reply = await alice.request(method, path)
        assert (reply.status_code, reply.content) == (204, b"")
        await checkpoint.arefresh_from_db()
        assert checkpoint.is_public is is_public


async def test_a_published_checkpoint_stays_its_owners(
    alice: Actor, bob: Actor, checkpoint: Checkpoint
) -> None:
    await alice.post(address(checkpoint, "/publish"))
    for method, tail in (("DELETE", ""), ("DELETE", "/publish"), ("PUT", "/ttl"), ("GET", "/archive")):
        reply = await bob.request(method, address(checkpoint, tail), {"ttl_seconds": 5})
        error_of(reply, 404)
    await checkpoint.arefresh_from_db()
    assert (checkpoint.is_public, checkpoint.expires_at) == (True, None)


async def test_a_lifetime_is_set_and_taken_away(alice: Actor, checkpoint: Checkpoint) -> None:
    assert (await alice.request("PUT", address(checkpoint, "/ttl"), {"ttl_seconds": 3600})).status_code == 204
    (shown,) = (await alice.get("checkpoints")).json()["checkpoints"]
    assert datetime.fromisoformat(shown["expires_at"]) > datetime.fromisoformat(shown["time"])
    assert (await alice.request("PUT", address(checkpoint, "/ttl"), {"ttl_seconds": None})).status_code == 204
    await checkpoint.arefresh_from_db()
    assert checkpoint.expires_at is None


@pytest.mark.parametrize(
    "body", [{}, {"ttl_seconds": 0}, {"ttl_seconds": -5}, {"ttl_seconds": "1"}, {"ttl_seconds": 10**15}]
)
async def test_a_lifetime_that_cannot_be_is_refused(
    alice: Actor, checkpoint: Checkpoint, body: dict[str, Any]
) -> None:
    reply = await alice.request("PUT", address(checkpoint, "/ttl"), body)
    assert error_of(reply, 422)["place"] == "ttl_seconds"


async def test_deleting_removes_the_files(alice: Actor, checkpoint: Checkpoint) -> None:
    folder = Path(default_storage.path(checkpoint.directory))
    assert folder.is_dir()
    assert (await alice.request("DELETE", address(checkpoint))).status_code == 204
    assert not folder.exists()
    assert not await Checkpoint.objects.filter(pk=checkpoint.pk).aexists()
    error_of(await alice.request("DELETE", address(checkpoint)), 404)


@pytest.mark.parametrize("kind", ["external_weights", "..", "nonsense"])
async def test_a_kind_nobody_knows_names_nothing(alice: Actor, run: TrainingRun, kind: str) -> None:
    path = f"training_runs/{run.public_id}/checkpoints/{kind}/one"
    reply = await alice.request("DELETE", path)
    assert error_of(reply, 404)["code"] == "not_found"


# -- archives -------------------------------------------------------------------------------------------------------


async def location_of(alice: Actor, checkpoint: Checkpoint) -> str:
    reply = await alice.get(address(checkpoint, "/archive"), accept="application/gzip")
    assert reply.status_code == 302
    return reply.headers["location"]


async def test_an_archive_is_fetched_without_a_key(alice: Actor, checkpoint: Checkpoint) -> None:
    location = await location_of(alice, checkpoint)
    assert location.startswith("http://localhost/")
    reply = await send("GET", location.removeprefix("http://localhost"))
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/x-tar")
    with tarfile.open(fileobj=io.BytesIO(reply.content)) as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == ["adapter_config.json", "adapter_model.safetensors"]
    assert all(member.isfile() for member in members)


async def test_an_archive_holds_the_files_bytes(checkpoint: Checkpoint) -> None:
    content = await in_thread(lambda: b"".join(archives.tar(checkpoint)))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        file = archive.extractfile("adapter_model.safetensors")
        assert file is not None
        assert file.read() == b"adapter_model.safetensors"
    assert len(content) % tarfile.RECORDSIZE == 0
    assert content.endswith(bytes(2 * tarfile.BLOCKSIZE))


async def test_an_adapter_of_eight_gib_has_a_header(checkpoint: Checkpoint) -> None:
    os.truncate(default_storage.path(f"{checkpoint.directory}/adapter_config.json"), 8 << 30)  # a hole
    header = await in_thread(lambda: next(archives.tar(checkpoint)))
    member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    assert (member.name, member.size) == ("adapter_config.json", 8 << 30)
    assert len(header) == tarfile.BLOCKSIZE


async def test_archives_on_their_way_hold_up_no_other_request(alice: Actor) -> None:
    goes_on = threading.Event()

    def parts() -> Iterator[bytes]:
        yield b"header"
        assert goes_on.wait(60)

    async def archive() -> Reply:
        return Reply(parts=parts())

    started = asyncio.Semaphore(0)

    async def send_out(message: dict[str, Any]) -> None:
        if message.get("body"):
            started.release()

    sending = [asyncio.create_task(respond({}, send_out, archive())) for _ in range(16)]
    try:
        async with asyncio.timeout(30):
            await started.acquire()
            assert (await alice.get("training_runs")).status_code == 200
    finally:
        goes_on.set()
        await asyncio.gather(*sending)


async def test_a_changed_or_foreign_signature_opens_nothing(alice: Actor, checkpoint: Checkpoint) -> None:
    token = (await location_of(alice, checkpoint)).rpartition("/")[2]
    others = [
        token[:-1],
        f"9{token}",
        str(checkpoint.pk),
        signing.TimestampSigner().sign(str(checkpoint.pk)),
        "%00",
    ]
    for other in others:
        error_of(await send("GET", f"/api/v1/archives/{other}"), 404)


async def test_the_archive_of_a_deleted_checkpoint_is_gone(alice: Actor, checkpoint: Checkpoint) -> None:
    location = await location_of(alice, checkpoint)
    await alice.request("DELETE", address(checkpoint))
    error_of(await send("GET", location.removeprefix("http://localhost")), 404)
