"""Reads the exchanges captured from the real SDKs, kept under tests/wire."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

WIRE = Path(__file__).parent.parent / "wire"


def names(part: str, *, content: str = "") -> list[str]:
    """Return `0.38/asample` and the like for all `.request.json` or `.response.json` that hold `content`."""
    suffix = f".{part}.json"
    paths = sorted(path for path in WIRE.rglob(f"*{suffix}") if content in path.read_text())
    return [str(path.relative_to(WIRE))[: -len(suffix)] for path in paths]


def read(name: str, part: str) -> dict[str, Any]:
    exchange: dict[str, Any] = json.loads((WIRE / f"{name}.{part}.json").read_text())
    return exchange


def body_bytes(exchange: dict[str, Any]) -> bytes:
    """Return the body as it went over the wire, still compressed if it was."""
    body = exchange["body"]
    if isinstance(body, dict) and "protobuf_message" in body:
        return base64.b64decode(body["base64"])
    return json.dumps(body).encode()
