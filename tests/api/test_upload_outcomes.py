"""What becomes of uploads: versions of datasets, refusals for want of room, nothing left behind."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings as django_settings
from django.core.files.storage import FileSystemStorage
from django.utils import timezone
from pytest_django.fixtures import Settings

from runs.models import Dataset, DatasetVersion, Upload
from runs.services import datasets, uploads
from tests.api.client import Actor, error_of
from tests.api.tus import REST, Tus, part_of, rows_of, upload_of


async def test_more_than_was_announced_is_refused(tus: Tus, data: bytes) -> None:
    path = await tus.begin(len(data))
    error_of(await tus.patch(path, 0, data + b"x"), 413)

    async def without_length() -> AsyncIterator[bytes]:
        yield data
        yield b"x"

    error_of(await tus.patch(path, 0, without_length()), 413)
    assert await tus.offset(path) == 0


async def test_a_file_that_is_too_large_is_refused_before_its_first_byte(
    tus: Tus, settings: Settings
) -> None:
    settings.MAX_UPLOAD_BYTES = 1000
    before = await Upload.objects.acount()
    error_of(await tus.create(1001), 413)
    assert await Upload.objects.acount() == before


async def test_a_file_that_does_not_fit_on_the_disk_is_refused_before_its_first_byte(
    tus: Tus, settings: Settings
) -> None:
    settings.MAX_UPLOAD_BYTES = 10**18
    stats = os.statvfs(settings.DATA_DIR)
    error = error_of(await tus.create(stats.f_bavail * stats.f_frsize), 507)
    assert error["code"] == "disk_full"


async def test_what_is_promised_to_others_is_not_free(tus: Tus, settings: Settings) -> None:
    settings.MAX_UPLOAD_BYTES = 10**18
    stats = os.statvfs(settings.DATA_DIR)
    third = stats.f_bavail * stats.f_frsize // 3
    path = await tus.begin(third)
    error_of(await tus.create(third), 507)
    assert (await tus.send("DELETE", path)).status_code == 204
    assert (await tus.send("DELETE", await tus.begin(third))).status_code == 204


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"upload_length": "-1"}, 422),
        ({"upload_length": "ten"}, 422),
        ({"upload_length": "9" * 40}, 422),
        ({"upload_length": "0"}, 422),
        ({}, 422),
        ({"upload_defer_length": "1"}, 422),
        ({"upload_length": "9", "upload_metadata": "filename ***"}, 422),
        ({"upload_length": "9", "upload_metadata": "filename /w=="}, 422),
        ({"upload_length": "9", "upload_metadata": "dataset ZHMtMA=="}, 404),
        ({"upload_length": "9", "upload_metadata": "dataset AA=="}, 422),
        ({"upload_length": "9", "tus_resumable": "0.2.0"}, 412),
    ],
)
async def test_a_bad_creation_leaves_nothing(tus: Tus, headers: dict[str, str], status: int) -> None:
    folder = Path(django_settings.DATA_DIR) / "uploads"
    before = await Upload.objects.acount(), len(list(folder.glob("*")))
    reply = await tus.send("POST", REST, **headers)
    assert reply.status_code == status, reply.text
    assert (await Upload.objects.acount(), len(list(folder.glob("*")))) == before


async def test_odd_names_become_plain_ones(tus: Tus, data: bytes) -> None:
    path = await tus.begin(len(data), filename="../../etc/\0pass\u202ewd\n.jsonl", name="\u200b")
    await tus.patch(path, 0, data)
    version = (await upload_of(path)).version
    assert version is not None
    assert version.filename == "../../etc/passwd.jsonl"
    assert version.dataset.name == "passwd"
    assert version.directory.startswith("datasets/")
    assert ".." not in version.directory


async def test_a_cancelled_upload_leaves_nothing(tus: Tus, data: bytes) -> None:
    path = await tus.begin(len(data))
    await tus.patch(path, 0, data[:100])
    assert (await tus.send("DELETE", path)).status_code == 204
    assert not part_of(path).exists()
    assert (await tus.send("HEAD", path)).status_code == 404


async def test_the_same_content_is_told_to_be_there_already(tus: Tus, data: bytes) -> None:
    first = await tus.begin(len(data))
    await tus.patch(first, 0, data)
    again = await tus.begin(len(data), name="another name")
    await tus.patch(again, 0, data)
    told = (await tus.send("GET", again)).json()["version"]
    assert told["is_known"] is True
    assert told["dataset"] == (await tus.send("GET", first)).json()["version"]["dataset"]
    assert told["problem"] == ""
    assert not part_of(again).exists()


async def test_content_that_is_read_as_another_type_is_told_with_the_way_out(tus: Tus, data: bytes) -> None:
    first = await tus.begin(len(data))
    await tus.patch(first, 0, data)
    dataset = (await tus.send("GET", first)).json()["version"]["dataset"]
    again = await tus.begin(len(data), dataset=dataset, filename="rows.txt")
    await tus.patch(again, 0, data)
    told = (await tus.send("GET", again)).json()["version"]
    assert (told["dataset"], told["number"], told["is_known"]) == (dataset, 1, True)
    for words in (f"{dataset}@1", "'rows.jsonl'", "'rows.txt'", "upload it as a dataset of its own"):
        assert words in told["problem"]


async def test_a_file_becomes_the_next_version_of_a_dataset(tus: Tus, data: bytes) -> None:
    first = await tus.begin(len(data))
    await tus.patch(first, 0, data)
    dataset = (await tus.send("GET", first)).json()["version"]["dataset"]
    more = data + rows_of("more")
    second = await tus.begin(len(more), dataset=dataset)
    await tus.patch(second, 0, more)
    told = (await tus.send("GET", second)).json()["version"]
    assert (told["dataset"], told["number"]) == (dataset, 2)


async def test_a_dataset_of_somebody_else_gets_no_version(tus: Tus, bob: Actor, data: bytes) -> None:
    path = await tus.begin(len(data))
    await tus.patch(path, 0, data)
    dataset = (await tus.send("GET", path)).json()["version"]["dataset"]
    other = Tus({"x-api-key": bob.key})
    error_of(await other.create(10, filename="a", dataset=dataset), 404)
    assert (await other.create(10, filename="a")).status_code == 201


async def test_a_file_whose_dataset_goes_is_not_kept(tus: Tus, data: bytes) -> None:
    path = await tus.begin(len(data))
    await tus.patch(path, 0, data)
    dataset = (await tus.send("GET", path)).json()["version"]["dataset"]
    more = data + b"\n"
    second = await tus.begin(len(more), dataset=dataset)
    await tus.patch(second, 0, more[:10])
    await Dataset.objects.filter(public_id=dataset).adelete()
    error_of(await tus.patch(second, 10, more[10:]), 404)
    assert await DatasetVersion.objects.filter(digest=hashlib.sha256(more).hexdigest()).acount() == 0


async def test_a_dataset_that_goes_while_its_last_bytes_come_is_missed(tus: Tus, data: bytes) -> None:
    path = await tus.begin(len(data))
    await tus.patch(path, 0, data)
    dataset = (await tus.send("GET", path)).json()["version"]["dataset"]
    more = rows_of("goes meanwhile")

    async def deleting() -> AsyncIterator[bytes]:
        yield more[:-10]
        await Dataset.objects.filter(public_id=dataset).adelete()
        yield more[-10:]

    second = await tus.begin(len(more), dataset=dataset)
    error = error_of(await tus.patch(second, 0, deleting()), 404)
    assert "deleted meanwhile" in error["detail"]


async def test_a_complete_file_whose_end_was_lost_is_finished_later(tus: Tus, data: bytes) -> None:
    asked = await tus.begin(len(data))
    part_of(asked).write_bytes(data)
    assert await tus.offset(asked) == len(data)
    assert (await upload_of(asked)).version is not None
    swept = await tus.begin(len(data) + 1)
    part_of(swept).write_bytes(data + b"\n")
    await sync_to_async(uploads.clean_up)()
    assert (await upload_of(swept)).version is not None


async def test_an_upload_whose_dataset_was_deleted_is_not_unfinished(
    tus: Tus, data: bytes, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await tus.begin(len(data))
    await tus.patch(path, 0, data)
    upload = await upload_of(path)
    assert upload.version is not None
    settings.MAX_UPLOAD_BYTES = 10**18
    stats = os.statvfs(settings.DATA_DIR)
    third = stats.f_bavail * stats.f_frsize // 3
    await Upload.objects.filter(pk=upload.pk).aupdate(size_bytes=third)
    await sync_to_async(lambda: datasets.delete(Dataset.objects.get(versions=upload.version_id)))()
    monkeypatch.setattr(uploads, "MAX_UNFINISHED", 1)
    assert (await tus.send("DELETE", await tus.begin(third))).status_code == 204
    await sync_to_async(uploads.clean_up)()
    assert not await Upload.objects.filter(pk=upload.pk).aexists()


async def test_an_upload_without_a_file_is_promised_nothing(tus: Tus, settings: Settings) -> None:
    settings.MAX_UPLOAD_BYTES = 10**18
    stats = os.statvfs(settings.DATA_DIR)
    third = stats.f_bavail * stats.f_frsize // 3
    part_of(await tus.begin(third)).unlink()
    assert (await tus.send("DELETE", await tus.begin(third))).status_code == 204


async def test_an_upload_that_storage_refuses_keeps_no_other_and_rests(
    tus: Tus, data: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused, expired = await tus.begin(len(data)), await tus.begin(len(data))
    part_of(refused).write_bytes(data)
    long_ago = timezone.now() - timedelta(seconds=1)
    await Upload.objects.filter(pk=(await upload_of(expired)).pk).aupdate(expires_at=long_ago)
    asked_for: list[str] = []
    clean_up = sync_to_async(uploads.clean_up)
    with monkeypatch.context() as patched:
        patched.setattr(FileSystemStorage, "path", lambda _, name: refuse(asked_for, name))
        await clean_up()
        assert not part_of(expired).exists()
        assert f"upload {refused.rpartition('/')[2]} could not be finished" in caplog.text
        num_asked = len(asked_for)
        await clean_up()
        assert len(asked_for) == num_asked > 0
    resting = await upload_of(refused)
    assert resting.metadata["tries"] == 1
    resting.metadata["rests_until"] = 0
    await resting.asave(update_fields=["metadata"])
    await clean_up()
    assert (await upload_of(refused)).version is not None


def refuse(asked_for: list[str], name: str) -> str:
    asked_for.append(name)
    raise PermissionError(name)


async def test_housekeeping_removes_what_has_expired(tus: Tus, data: bytes) -> None:
    expired, alive = await tus.begin(len(data)), await tus.begin(len(data))
    for path in (expired, alive):
        await tus.patch(path, 0, data[:10])
    orphan = part_of("up-nobody")
    orphan.write_bytes(b"x")
    os.utime(orphan, (0, 0))
    await Upload.objects.filter(public_id=expired.rpartition("/")[2]).aupdate(
        expires_at=timezone.now() - timedelta(seconds=1)
    )
    await sync_to_async(uploads.clean_up)()
    assert (await tus.send("HEAD", expired)).status_code == 404
    assert not part_of(expired).exists()
    assert not orphan.exists()
    assert await tus.offset(alive) == 10
