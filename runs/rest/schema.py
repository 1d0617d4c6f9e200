"""What Ninja cannot know about the API's OpenAPI document: errors, headers, statuses every address can answer."""

from __future__ import annotations

from typing import Any, Final

from runs.rest.errors import ErrorReply

_ERROR: Final = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}}
_IDEMPOTENCY: Final = {
    "in": "header",
    "name": "Idempotency-Key",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    "description": "The first success with this key is repeated for 24 hours instead of doing it again.",
}
_IF_NONE_MATCH: Final = {
    "in": "header",
    "name": "If-None-Match",
    "required": False,
    "schema": {"type": "string"},
    "description": "The ETag of the answer you have; 304 when it is still that.",
}
_IF_MATCH: Final = {
    "in": "header",
    "name": "If-Match",
    "required": False,
    "schema": {"type": "string"},
    "description": "The ETag of the object you mean to change; 412 when it is another by now.",
}
_EXTRA: Final = {"post": _IDEMPOTENCY, "get": _IF_NONE_MATCH, "patch": _IF_MATCH}


def completed(document: dict[str, Any], *, server: str) -> dict[str, Any]:
    """Return Ninja's document with the rest."""
    error = ErrorReply.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = document["components"]["schemas"]
    schemas |= error.pop("$defs")
    schemas["ErrorReply"] = error
    document["servers"] = [{"url": server}] if server else []
    for operations in document["paths"].values():
        for method, operation in operations.items():
            _complete(method, operation)
    return document


def _complete(method: str, operation: dict[str, Any]) -> None:
    responses = {str(status): answer for status, answer in operation["responses"].items()}
    # What Ninja promises of a view that answers by itself is an empty 200.
    responses["4XX"] = {"description": "The request is at fault", **_ERROR}
    responses["5XX"] = {"description": "The server is at fault, or not ready", **_ERROR}
    is_file = "content" in responses.get("200", {}) and (
        "application/json" not in responses["200"]["content"] or len(responses["200"]["content"]) > 1
    )
    if method == "get" and not is_file:
        responses["304"] = {"description": "Unchanged"}
    operation["responses"] = responses
    extra = _EXTRA.get(method)
    if extra is not None and not is_file and operation["operationId"] != "create_key":
        operation["parameters"] = [*operation.get("parameters", []), extra]
