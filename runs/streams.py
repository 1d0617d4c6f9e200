"""Answers that are sent while they are made."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from asgiref.sync import sync_to_async
from django.http import StreamingHttpResponse
from django.utils.http import content_disposition_header


def streamed(parts: Iterator[bytes], *, content_type: str, filename: str) -> StreamingHttpResponse:
    """Send a file under a name."""
    response = StreamingHttpResponse(_pulled(parts), content_type=content_type)
    response["Content-Disposition"] = content_disposition_header(as_attachment=True, filename=filename) or ""
    response["Cache-Control"] = "private, no-cache"
    return response


async def _pulled(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    read = sync_to_async(lambda: next(parts, None))
    while (part := await read()) is not None:
        if part:
            yield part
