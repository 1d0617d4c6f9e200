"""Uploads by the tus protocol 1.0 (core, creation, checksum, expiration, termination), for browsers and scripts.

Lean ASGI handlers beside Django: its own would first write the whole body of a request to a temporary
file, without a limit. Here a piece of 1 MiB is in memory at most, and goes to its place at once.

Source: https://tus.io/protocols/resumable-upload (1.0.0).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Any, Final, TypeVar

from django.conf import settings
from django.utils.http import http_date

from runs.api.browser import signed_in_user
from runs.api.decorators import (
    NO_CONTENT,
    Receive,
    Reply,
    Scope,
    Send,
    credential_in,
    headers_of,
    in_thread,
    json_reply,
    respond,
    user_of,
)
from runs.api.request_bodies import ClientLeft
from runs.exceptions import MethodNotAllowed, RequestInvalid, UnsupportedMedia, UploadBusy
from runs.models import Upload, User
from runs.services import access, datasets, uploads
from runs.services.upload_files import CHECKSUMS, Checksum

Result = TypeVar("Result")

VERSION: Final = "1.0.0"
EXTENSIONS: Final = "creation,expiration,checksum,termination"
BODY_TYPE: Final = "application/offset+octet-stream"
IDLE_S: Final = 30.0
_BLOCK_BYTES: Final = 1 << 20
_INTERRUPT_S: Final = 10.0
_MAX_METADATA_CHARS: Final = 40_000
_NUMBER: Final = re.compile(r"[0-9]{1,18}")
# A pool of its own: a disk that takes long must not hold up the calls of training loops.
_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="uploads")


class Incoming:
    """The body of a request as blocks of about 1 MiB; it ends early when the client stalls, leaves or is replaced."""

    def __init__(self, receive: Receive) -> None:
        self.is_whole = False
        self.has_left = False
        self.is_over = asyncio.Event()
        self._is_interrupted = False
        self._receive = receive
        self._waiting: asyncio.Timeout | None = None

    def interrupt(self) -> None:
        """End it: the client has come again by another connection."""
        self._is_interrupted = True
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def blocks(self) -> AsyncIterator[bytes]:
        """Yield what arrives."""
        block = bytearray()
        while (part := await self._next()) is not None:
            block += part
            if len(block) >= _BLOCK_BYTES:
                yield bytes(block)
                block.clear()
            if self.is_whole:
                break
        if block:
            yield bytes(block)

    async def _next(self) -> bytes | None:
        if self._is_interrupted:
            return None
        try:
            async with asyncio.timeout(IDLE_S) as self._waiting:
                message = await self._receive()
        except TimeoutError:
            return None
        finally:
            self._waiting = None
        if message["type"] == "http.disconnect":
            self.has_left = True
            return None
        self.is_whole = not message.get("more_body", False)
        body: bytes = message.get("body", b"")
        return body


@dataclasses.dataclass(frozen=True, kw_only=True)
class TusRequest:
    """A request whose sender is known; its body waits in `receive`. Header names are lower case."""

    path: str
    headers: Mapping[str, str]
    user: User
    upload_id: str
    receive: Receive

    def number(self, name: str) -> int:
        """Return a header that is a number of bytes.

        Raises:
            RequestInvalid: it is missing or something else.
        """
        text = self.headers.get(name, "")
        if not _NUMBER.fullmatch(text):
            raise RequestInvalid(f"must be a number of bytes, not {text[:40]!r}", place=name)
        return int(text)


View = Callable[[TusRequest], Coroutine[Any, Any, Reply]]
# The requests that append at this moment, by upload.
_active: dict[str, Incoming] = {}


class UploadEndpoint:
    """An ASGI application with one view per method, for the owner: by session and token, or by API key."""

    policy: Final = "owner"

    def __init__(self, views: Mapping[str, View]) -> None:
        self.views: Mapping[str, View] = {**views, "OPTIONS": _options}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; every answer names the protocol's version."""

        async def send_versioned(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"tus-resumable", VERSION.encode()), (b"cache-control", b"no-store")]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await respond(scope, send_versioned, self._answer(scope, receive))

    async def _answer(self, scope: Scope, receive: Receive) -> Reply:
        headers = headers_of(scope)
        method: str = scope["method"]
        if method == "POST":
            method = headers.get("x-http-method-override", method).upper()
        credential = credential_in(headers)
        user = await (user_of(credential) if credential else _in_thread(lambda: signed_in_user(scope)))
        view = self.views.get(method)
        if view is None:
            raise MethodNotAllowed(f"use {' or '.join(self.views)} here, not {method[:20]}")
        if method not in ("GET", "OPTIONS") and headers.get("tus-resumable") != VERSION:
            return Reply(status=412, headers={"tus-version": VERSION}, content_type="text/plain")
        upload_id: str = scope["url_route"]["kwargs"].get("upload_id", "").replace("\0", "")
        return await view(
            TusRequest(path=scope["path"], headers=headers, user=user, upload_id=upload_id, receive=receive)
        )


async def _options(request: TusRequest) -> Reply:
    headers = {
        "tus-version": VERSION,
        "tus-extension": EXTENSIONS,
        "tus-max-size": str(settings.MAX_UPLOAD_BYTES),
        "tus-checksum-algorithm": ",".join(CHECKSUMS),
    }
    return dataclasses.replace(NO_CONTENT, headers=headers)


async def _create(request: TusRequest) -> Reply:
    if "upload-defer-length" in request.headers:
        raise RequestInvalid("the length must be known from the start", place="upload-defer-length")
    size_bytes = request.number("upload-length")
    metadata = _metadata(request.headers.get("upload-metadata", ""))
    upload = await _in_thread(lambda: uploads.create(request.user, size_bytes=size_bytes, metadata=metadata))
    headers = {"location": f"{request.path}{upload.public_id}", "upload-expires": _date(upload.expires_at)}
    return json_reply({"id": upload.public_id}, status=201, headers=headers)


async def _offset(request: TusRequest) -> Reply:
    upload = await _upload_of(request)
    # Whoever asks is about to go on: a request whose connection broke unnoticed must not hold the file.
    if (other := _active.get(upload.public_id)) is not None:
        other.interrupt()
        try:
            await asyncio.wait_for(other.is_over.wait(), _INTERRUPT_S)
        except TimeoutError:
            raise UploadBusy from None
    offset = await _in_thread(lambda: uploads.settle(upload))
    headers = {"upload-offset": str(offset), "upload-length": str(upload.size_bytes)}
    return Reply(headers={**headers, "upload-expires": _date(upload.expires_at)})


async def _append(request: TusRequest) -> Reply:
    if request.headers.get("content-type", "") != BODY_TYPE:
        raise UnsupportedMedia(f"send the bytes as {BODY_TYPE}")
    offset = request.number("upload-offset")
    length = request.number("content-length") if "content-length" in request.headers else None
    checksum = _checksum(request.headers.get("upload-checksum", ""))
    upload = await _upload_of(request)
    writer = await _in_thread(lambda: uploads.begin(upload, offset=offset, length=length, checksum=checksum))
    incoming = _active[upload.public_id] = Incoming(request.receive)
    try:
        async for block in incoming.blocks():
            await _in_thread(partial(writer.write, block))
        ended = await _in_thread(lambda: uploads.end(upload, writer, is_whole=incoming.is_whole))
    finally:
        writer.close()
        del _active[upload.public_id]
        incoming.is_over.set()
    if incoming.has_left:
        raise ClientLeft
    if not incoming.is_whole:
        raise UploadBusy(f"the bytes stopped coming; the upload goes on from byte {writer.offset}")
    headers = {"upload-offset": str(writer.offset), "upload-expires": _date(ended.expires_at)}
    return dataclasses.replace(NO_CONTENT, headers=headers)


async def _cancel(request: TusRequest) -> Reply:
    upload = await _upload_of(request)
    if (other := _active.get(upload.public_id)) is not None:
        other.interrupt()
        await asyncio.wait({asyncio.ensure_future(other.is_over.wait())}, timeout=_INTERRUPT_S)
    await _in_thread(lambda: uploads.cancel(upload))
    return NO_CONTENT


async def _status(request: TusRequest) -> Reply:
    """Tell in JSON how far an upload is and which version it became; no part of tus."""
    upload = await _upload_of(request)
    return json_reply(await _in_thread(lambda: _described(upload)))


def _described(upload: Upload) -> dict[str, Any]:
    offset = uploads.settle(upload)
    version = upload.version
    made: dict[str, Any] | None = None
    if version is not None:
        dataset = version.dataset.public_id
        made = {
            "dataset": dataset,
            "number": version.number,
            "state": version.state,
            "is_known": upload.metadata.get("is_known", False),
            "problem": datasets.misread(version, upload.filename),
            "url": f"/datasets/{dataset}/?version={version.number}",
        }
    return {
        "id": upload.public_id,
        "filename": upload.filename,
        "size_bytes": upload.size_bytes,
        "offset": offset,
        "expires_at": upload.expires_at.isoformat(),
        "version": made,
    }


async def _upload_of(request: TusRequest) -> Upload:
    return await _in_thread(lambda: access.get_upload(request.user, request.upload_id))


async def _in_thread(call: Callable[[], Result]) -> Result:
    """Run a call in the pool of uploads; one that has begun is waited for, whatever happens.

    A request that is cancelled closes its file, which must not be in use by a thread then.
    """
    running = asyncio.ensure_future(in_thread(call, _threads))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


def _date(moment: datetime) -> str:
    return http_date(moment.timestamp())


def _metadata(text: str) -> dict[str, str]:
    """Return the pairs of Upload-Metadata: `name base64,name base64`."""
    if len(text) > _MAX_METADATA_CHARS:
        raise RequestInvalid(f"must have at most {_MAX_METADATA_CHARS} characters", place="upload-metadata")
    pairs = {}
    for item in text.split(",") if text else []:
        name, _, value = item.strip().partition(" ")
        try:
            pairs[name] = base64.b64decode(value, validate=True).decode()
        except (binascii.Error, ValueError):
            raise RequestInvalid(
                f"the value of {name[:40]!r} is not UTF-8 text in base64", place="upload-metadata"
            ) from None
    if "\0" in pairs.get("dataset", ""):  # no text of PostgreSQL's holds one; from the others it is taken out
        raise RequestInvalid("the value of 'dataset' must not hold NUL", place="upload-metadata")
    return pairs


def _checksum(text: str) -> Checksum | None:
    """Return what Upload-Checksum says: `algorithm base64`."""
    if not text:
        return None
    algorithm, _, digest = text.partition(" ")
    if algorithm not in CHECKSUMS:
        raise RequestInvalid(
            f"the algorithm is {algorithm[:20]!r}; use {', '.join(CHECKSUMS)}", place="upload-checksum"
        )
    try:
        return Checksum(algorithm=algorithm, digest=base64.b64decode(digest, validate=True))
    except binascii.Error:
        raise RequestInvalid("the checksum is not base64", place="upload-checksum") from None


collection: Final = UploadEndpoint({"POST": _create})
single: Final = UploadEndpoint({"HEAD": _offset, "GET": _status, "PATCH": _append, "DELETE": _cancel})
