"""Answers as JSON bytes: times in UTC with a Z, never NaN or Infinity."""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any

from django.http import HttpRequest
from ninja.renderers import BaseRenderer
from pydantic import BaseModel, BeforeValidator
from pydantic_core import to_json as _to_json


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A number that JSON can say; one that is not finite is null.
Number = Annotated[float | None, BeforeValidator(_finite)]


def to_json(value: object) -> bytes:
    """Return a plain value, times and all, as JSON."""
    return _to_json(value, inf_nan_mode="null")


def etag_of(content: bytes) -> str:
    """Return the ETag of an answer."""
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def etag_of_model(model: BaseModel) -> str:
    """Return the ETag that a GET of this object is answered with."""
    return etag_of(to_json(model.model_dump()))


class Renderer(BaseRenderer):
    """How Ninja writes an answer."""

    media_type = "application/json"

    def render(self, request: HttpRequest, data: Any, *, response_status: int) -> bytes:
        """Return the body."""
        return to_json(data)
