"""Uploads by the tus protocol: whole, cut off and resumed, raced, refused."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from typing import Any

import pytest
from django.conf import settings as django_settings

from runs.api import uploads as endpoint
from tests.api.client import Actor, error_of
from tests.api.tus import OFFSET_TYPE, PAGES, REST, Tus, part_of, patch_by_hand, upload_of


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
