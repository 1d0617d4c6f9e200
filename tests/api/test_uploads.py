"""Uploads by the tus protocol: whole, cut off and resumed, raced, refused."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import secrets
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgiref.sync import sync_to_async
from django.conf import settings as django_settings
from django.test import Client
from django.utils import timezone
from pytest_django.fixtures import Settings

from runs.api import uploads as endpoint
from runs.models import Dataset, DatasetVersion, Upload
from runs.services import uploads
from tests.api.client import Actor, application, error_of, http

PAGES, REST = "/datasets/uploads/", "/rest/v1/uploads/"
OFFSET_TYPE = "application/offset+octet-stream"
TUS = {"tus-resumable": "1.0.0"}


def rows_of(seed: str, count: int = 400) -> bytes:
    """Return a file with rows that no other test has."""
    return b"".join(b'{"prompt": "%s %d", "completion": "yes"}\n' % (seed.encode(), n) for n in range(count))


@pytest.fixture
def data() -> bytes:
    return rows_of(secrets.token_hex(8))


class Tus:
    """A client of one address, with an API key or with the cookies of a browser."""

    def __init__(self, headers: dict[str, str], *, base: str = REST) -> None:
        self.headers, self.base = headers, base

    async def send(self, method: str, path: str, content: Any = None, **headers: str) -> httpx.Response:
        sent = {name.replace("_", "-"): text for name, text in headers.items()}
        async with http() as client:
            return await client.request(
                method, path, content=content, headers={**TUS, **self.headers, **sent}
            )

    async def create(self, size: int, **metadata: str) -> httpx.Response:
        pairs = [f"{name} {base64.b64encode(value.encode()).decode()}" for name, value in metadata.items()]
        return await self.send("POST", self.base, upload_length=str(size), upload_metadata=",".join(pairs))

    async def begin(self, size: int, **metadata: str) -> str:
        reply = await self.create(size, **{"filename": "rows.jsonl", **metadata})
        assert reply.status_code == 201, reply.text
        return str(reply.headers["location"])

    async def patch(self, path: str, offset: int, content: Any, **headers: str) -> httpx.Response:
        return await self.send(
            "PATCH", path, content, upload_offset=str(offset), content_type=OFFSET_TYPE, **headers
        )

    async def offset(self, path: str) -> int:
        reply = await self.send("HEAD", path)
        assert reply.status_code == 200
        assert reply.headers["cache-control"] == "no-store"
        return int(reply.headers["upload-offset"])


@pytest.fixture
def tus(alice: Actor) -> Tus:
    return Tus({"x-api-key": alice.key})


@pytest.fixture
def browser(alice: Actor) -> Tus:
    """Alice's browser on a page of ours."""
    client = Client()
    client.force_login(alice.user)
    client.get("/login/")
    token = "t" * 32
    cookies = f"mintweb_session={client.cookies['mintweb_session'].value}; csrftoken={token}"
    return Tus({"cookie": cookies, "x-csrftoken": token}, base=PAGES)


def part_of(path: str) -> Path:
    return Path(django_settings.DATA_DIR) / "uploads" / f"{path.rpartition('/')[2]}.part"


async def upload_of(path: str) -> Upload:
    rows = Upload.objects.select_related("version__dataset")
    return await rows.aget(public_id=path.rpartition("/")[2])


async def test_a_whole_file_becomes_a_version(tus: Tus, data: bytes) -> None:
    path = await tus.begin(len(data), name="Yes men", description="all agree")
    reply = await tus.patch(path, 0, data)
    assert reply.status_code == 204, reply.text
    assert reply.headers["upload-offset"] == str(len(data))
    assert reply.headers["tus-resumable"] == "1.0.0"
    assert "upload-expires" in reply.headers
    version = (await upload_of(path)).version
    assert version is not None
    assert version.digest == hashlib.sha256(data).hexdigest()
    assert (version.dataset.name, version.dataset.description) == ("Yes men", "all agree")
    assert version.filename == "rows.jsonl"
    assert not part_of(path).exists()
    assert await tus.offset(path) == len(data)
    told = (await tus.send("GET", path)).json()
    assert told["version"]["dataset"] == version.dataset.public_id
    assert told["version"]["is_known"] is False


async def test_options_tell_what_the_server_can(tus: Tus) -> None:
    reply = await tus.send("OPTIONS", REST)
    assert reply.status_code == 204
    assert reply.headers["tus-version"] == "1.0.0"
    assert reply.headers["tus-extension"] == "creation,expiration,checksum,termination"
    assert reply.headers["tus-max-size"] == str(django_settings.MAX_UPLOAD_BYTES)
    assert "sha1" in reply.headers["tus-checksum-algorithm"].split(",")


async def test_a_browser_uses_its_session_and_the_token_of_the_page(browser: Tus, data: bytes) -> None:
    path = await browser.begin(len(data))
    assert path.startswith(PAGES)
    assert (await browser.patch(path, 0, data)).status_code == 204


@pytest.mark.parametrize("token", ["", "x" * 32])
async def test_a_browser_without_the_token_is_refused(browser: Tus, data: bytes, token: str) -> None:
    path = await browser.begin(len(data))
    browser.headers["x-csrftoken"] = token
    for method, address in (("POST", PAGES), ("PATCH", path), ("DELETE", path)):
        headers = {"upload_length": "10", "upload_offset": "0", "content_type": OFFSET_TYPE}
        error_of(await browser.send(method, address, b"x", **headers), 403)
    overridden = await browser.send("POST", path, b"", x_http_method_override="DELETE")
    error_of(overridden, 403)
    assert await browser.offset(path) == 0


async def test_another_site_is_refused_even_with_the_token(browser: Tus) -> None:
    reply = await browser.send("POST", PAGES, upload_length="10", origin="http://evil.example")
    error_of(reply, 403)


async def test_without_session_and_key_nothing_opens(browser: Tus) -> None:
    for headers in ({}, {"cookie": "mintweb_session=" + "x" * 32}, {"x-api-key": "tml-wrong-key-of-nobody"}):
        stranger = Tus(headers)
        error_of(await stranger.create(10), 401)
        assert (await stranger.send("HEAD", PAGES + "up-1")).status_code == 401


async def test_an_upload_of_somebody_else_is_missing(tus: Tus, bob: Actor, data: bytes) -> None:
    path = await tus.begin(len(data))
    await tus.patch(path, 0, data[:100])
    other = Tus({"authorization": f"Bearer {bob.key}"})
    missing = error_of(await other.send("GET", REST + "up-missing"), 404)
    for method in ("HEAD", "GET", "PATCH", "DELETE"):
        reply = await other.send(method, path, b"x", upload_offset="100", content_type=OFFSET_TYPE)
        assert reply.status_code == 404
        if method != "HEAD":
            assert error_of(reply, 404)["code"] == missing["code"]
    assert await tus.offset(path) == 100


async def test_it_goes_on_where_it_was_cut_off(tus: Tus, alice: Actor, data: bytes) -> None:
    path = await tus.begin(len(data))
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": data[:4096], "more_body": True},
        {"type": "http.disconnect"},
    ]
    await patch_by_hand(path, alice, messages, offset=0)
    assert await tus.offset(path) == 4096
    assert (await tus.patch(path, 4096, data[4096:7000])).status_code == 204
    assert (await tus.patch(path, 7000, data[7000:])).status_code == 204
    version = (await upload_of(path)).version
    assert version is not None
    assert version.digest == hashlib.sha256(data).hexdigest()


async def test_a_client_that_stalls_is_cut_off(
    tus: Tus, alice: Actor, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "IDLE_S", 0.05)
    path = await tus.begin(len(data))
    sent = await patch_by_hand(
        path, alice, [{"type": "http.request", "body": data[:64], "more_body": True}], offset=0
    )
    assert sent[0]["status"] == 423
    assert await tus.offset(path) == 64


async def test_whoever_comes_again_does_not_wait_for_the_old_connection(
    tus: Tus, alice: Actor, data: bytes
) -> None:
    path = await tus.begin(len(data))
    hanging = asyncio.create_task(
        patch_by_hand(path, alice, [{"type": "http.request", "body": data[:64], "more_body": True}], offset=0)
    )
    while path.rpartition("/")[2] not in endpoint._active:
        await asyncio.sleep(0)
    assert error_of(await tus.patch(path, 0, data), 423)["code"] == "upload_busy"
    offset = await tus.offset(path)
    assert (await tus.patch(path, offset, data[offset:])).status_code == 204
    assert (await hanging)[0]["status"] == 423
    version = (await upload_of(path)).version
    assert version is not None
    assert version.digest == hashlib.sha256(data).hexdigest()


async def test_a_wrong_offset_changes_nothing(tus: Tus, data: bytes) -> None:
    path = await tus.begin(len(data))
    await tus.patch(path, 0, data[:100])
    for offset in (0, 99, 101, len(data)):
        error_of(await tus.patch(path, offset, b"x"), 409)
    assert await tus.offset(path) == 100


async def test_a_wrong_checksum_cuts_the_bytes_off_again(tus: Tus, data: bytes) -> None:
    path = await tus.begin(len(data))
    right = base64.b64encode(hashlib.sha1(data[:100]).digest()).decode()
    assert (await tus.patch(path, 0, data[:100], upload_checksum=f"sha1 {right}")).status_code == 204
    reply = await tus.patch(path, 100, data[100:], upload_checksum=f"sha1 {right}")
    assert error_of(reply, 460)["code"] == "checksum_mismatch"
    assert await tus.offset(path) == 100
    error_of(await tus.patch(path, 100, data[100:], upload_checksum="crc32 AAAA"), 422)
    digest = base64.b64encode(hashlib.sha256(data[100:]).digest()).decode()
    assert (await tus.patch(path, 100, data[100:], upload_checksum=f"sha256 {digest}")).status_code == 204


async def test_part_of_a_checked_request_is_not_kept(tus: Tus, alice: Actor, data: bytes) -> None:
    path = await tus.begin(len(data))
    digest = base64.b64encode(hashlib.sha1(data).digest()).decode()
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": data[:4096], "more_body": True},
        {"type": "http.disconnect"},
    ]
    await patch_by_hand(path, alice, messages, offset=0, upload_checksum=f"sha1 {digest}")
    assert await tus.offset(path) == 0


async def test_of_many_at_once_one_is_taken(tus: Tus, data: bytes) -> None:
    path = await tus.begin(len(data))
    replies = await asyncio.gather(*(tus.patch(path, 0, data) for _ in range(12)))
    statuses = sorted(reply.status_code for reply in replies)
    assert statuses.count(204) == 1
    assert set(statuses) <= {204, 409, 423}
    version = (await upload_of(path)).version
    assert version is not None
    assert version.size_bytes == len(data)
    assert version.digest == hashlib.sha256(data).hexdigest()


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


async def test_another_type_of_body_is_refused(tus: Tus, data: bytes) -> None:
    path = await tus.begin(len(data))
    reply = await tus.send("PATCH", path, data, upload_offset="0", content_type="application/json")
    error_of(reply, 415)
    error_of(await tus.send("PUT", path, data), 405)


async def test_a_proxy_without_patch_can_be_gone_around(tus: Tus, data: bytes) -> None:
    path = await tus.begin(len(data))
    reply = await tus.send(
        "POST",
        path,
        data,
        x_http_method_override="PATCH",
        upload_offset="0",
        content_type=OFFSET_TYPE,
    )
    assert reply.status_code == 204


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
    assert not part_of(again).exists()


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


async def test_a_complete_file_whose_end_was_lost_is_finished_later(tus: Tus, data: bytes) -> None:
    asked = await tus.begin(len(data))
    part_of(asked).write_bytes(data)
    assert await tus.offset(asked) == len(data)
    assert (await upload_of(asked)).version is not None
    swept = await tus.begin(len(data) + 1)
    part_of(swept).write_bytes(data + b"\n")
    await sync_to_async(uploads.clean_up)()
    assert (await upload_of(swept)).version is not None


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


async def patch_by_hand(
    path: str, actor: Actor, messages: list[dict[str, Any]], *, offset: int, **headers: str
) -> list[dict[str, Any]]:
    """Append in bare ASGI messages; after the last of them nothing more comes."""
    sent: list[dict[str, Any]] = []
    given = {"x-api-key": actor.key, **TUS, "upload-offset": str(offset), "content-type": OFFSET_TYPE}
    given |= {name.replace("_", "-"): text for name, text in headers.items()}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "PATCH",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), text.encode()) for name, text in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
    }
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await application(scope, receive, send)
    return sent
