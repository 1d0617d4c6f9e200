"""Downloads of a dataset version: the file as it was uploaded, and the rows that were refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import PurePosixPath
from typing import Final

from asgiref.sync import sync_to_async
from django.core.files.storage import default_storage
from django.http import HttpRequest, HttpResponseBase, StreamingHttpResponse
from django.utils.http import content_disposition_header
from django.views.decorators.http import require_GET

from runs.exceptions import NotFound
from runs.models import User
from runs.pages.policies import signed_in
from runs.services import access
from runs.services.dataset_checks import BAD_ROWS, ORIGINAL

_CHUNK_BYTES: Final = 1 << 20


@signed_in
@require_GET
def original(request: HttpRequest, dataset_id: str, number: int) -> HttpResponseBase:
    """Send the file as it was uploaded."""
    user: User = request.user  # type: ignore[assignment]
    version = access.get_dataset_version(user, dataset_id, number)
    return _sent(f"{version.directory}/{ORIGINAL}", PurePosixPath(version.filename).name or "data")


@signed_in
@require_GET
def bad_rows(request: HttpRequest, dataset_id: str, number: int) -> HttpResponseBase:
    """Send the refused rows with what is wrong with each, one JSON object a line."""
    user: User = request.user  # type: ignore[assignment]
    version = access.get_dataset_version(user, dataset_id, number)
    return _sent(f"{version.directory}/{BAD_ROWS}", f"{dataset_id}-{number}-bad-rows.jsonl")


def _sent(name: str, filename: str) -> HttpResponseBase:
    if not default_storage.exists(name):
        raise NotFound("this version has no such file")
    response = StreamingHttpResponse(_chunks(name), content_type="application/octet-stream")
    response["Content-Length"] = str(default_storage.size(name))
    response["Content-Disposition"] = content_disposition_header(True, filename) or "attachment"
    return response


async def _chunks(name: str) -> AsyncIterator[bytes]:
    # Opened here, not before: a response that nobody reads is never begun.
    file = await sync_to_async(default_storage.open)(name)
    try:
        while chunk := await sync_to_async(file.read)(_CHUNK_BYTES):
            yield chunk
    finally:
        await sync_to_async(file.close)()
