"""A client of the tus protocol, for tests of uploads."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx
from django.conf import settings as django_settings

from runs.models import Upload
from tests.api.client import Actor, application, http

PAGES, REST = "/datasets/uploads/", "/rest/v1/uploads/"
OFFSET_TYPE = "application/offset+octet-stream"
TUS = {"tus-resumable": "1.0.0"}


def rows_of(seed: str, count: int = 400) -> bytes:
    """Return a file with rows that no other test has."""
    return b"".join(b'{"prompt": "%s %d", "completion": "yes"}\n' % (seed.encode(), n) for n in range(count))


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


def part_of(path: str) -> Path:
    return Path(django_settings.DATA_DIR) / "uploads" / f"{path.rpartition('/')[2]}.part"


async def upload_of(path: str) -> Upload:
    rows = Upload.objects.select_related("version__dataset")
    return await rows.aget(public_id=path.rpartition("/")[2])


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
