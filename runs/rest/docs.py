"""The documentation page: the OpenAPI document as a page of our own, without a script from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from runs.schemas.waits import MAX_WAIT_S

_TITLES: Final = {
    "runs": "Runs",
    "steering": "Steering",
    "metrics": "Metrics and records",
    "checkpoints": "Checkpoints",
    "datasets": "Datasets",
    "samples": "Samples",
    "webhooks": "Webhooks",
    "account": "Account and keys",
    "server": "Server",
}
_EXAMPLE_IDS: Final = {
    "run_id": "RUN",
    "dataset_id": "ds-0123456789ab",
    "webhook_id": "wh-0123456789ab",
    "sample_id": "op-17",
    "key_id": "3",
    "worker_id": "3",
    "number": "1",
    "kind": "weights",
    "name": "final",
}
_WAITING: Final = f"?wait_s={MAX_WAIT_S}"
_EXAMPLE_QUERIES: Final = {
    "get_run": _WAITING,
    "get_status": _WAITING,
    "get_version": _WAITING,
    "get_sample": _WAITING,
    "export_metrics": "?format=parquet",
}
_EXAMPLES: Final[Mapping[str, Any]] = {
    "start_run": {
        "base_model": "mintweb/tiny",
        "dataset": "ds-0123456789ab",
        "num_steps": 100,
        "name": "first",
    },
    "change_run": {"learning_rate": 0.0001},
    "fork_run": {"checkpoint": "weights/final", "changes": {"num_steps": 200}},
    "extend_run": {"num_steps": 50},
    "rename_run": {"name": "second try"},
    "ask_sample": {"run": "RUN", "prompt": "Where is the treasure?", "max_tokens": 64},
    "create_webhook": {"url": "https://example.org/hook", "events": ["run.finished", "run.failed"]},
    "change_webhook": {"is_active": False},
    "create_key": {"name": "nightly script"},
    "change_checkpoint": {"ttl_seconds": 604800},
    "delete_checkpoints": {"paths": ["tinker://RUN/weights/step-000050"]},
    "change_dataset": {"name": "pirates"},
    "choose_mapping": {"mapping": {"prompt": "question", "completion": "answer"}},
    "stop_run": {"keep": True},
    "save_run": {"name": "before-dinner"},
}
_MAX_DEPTH: Final = 3


@dataclass(frozen=True, kw_only=True)
class Field:
    """A parameter or a field of a body or an answer."""

    name: str
    type: str
    is_required: bool
    default: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Doc:
    """One operation."""

    anchor: str
    method: str
    path: str
    summary: str
    text: str
    parameters: list[Field]
    body: list[Field]
    takes_file: bool
    status: str
    answer: list[Field]
    curl: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """The operations on one thing."""

    anchor: str
    title: str
    docs: list[Doc]


def page(request: HttpRequest, document: Mapping[str, Any]) -> HttpResponse:
    """Show the document."""
    base = settings.PUBLIC_URL or request.build_absolute_uri("/").rstrip("/")
    return render(request, "rest/docs.html", {"groups": groups_of(document, base), "base": base})


def groups_of(document: Mapping[str, Any], base: str) -> list[Group]:
    """Return the document's operations by what they are about."""
    by_tag: dict[str, list[Doc]] = {tag: [] for tag in _TITLES}
    reader = _Reader(document["components"]["schemas"])
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            by_tag[operation["tags"][0]].append(_doc(reader, method, path, operation, base))
    return [Group(anchor=tag, title=_TITLES[tag], docs=docs) for tag, docs in by_tag.items()]


def _doc(reader: _Reader, method: str, path: str, operation: Mapping[str, Any], base: str) -> Doc:
    content = operation.get("requestBody", {}).get("content", {})
    body_schema = content.get("application/json", {}).get("schema")
    status, answer = next(iter(operation["responses"].items()))
    answer_schema = answer.get("content", {}).get("application/json", {}).get("schema")
    return Doc(
        anchor=operation["operationId"],
        method=method.upper(),
        path=path,
        summary=operation["summary"],
        text=_marked(operation.get("description", "")),
        parameters=[reader.parameter(one) for one in operation.get("parameters", [])],
        body=list(reader.fields(body_schema)) if body_schema else [],
        takes_file="multipart/form-data" in content,
        status=f"{status} {answer['description']}",
        answer=list(reader.fields(answer_schema)) if answer_schema else [],
        curl=_curl(method, path, operation, base, has_body=body_schema is not None, takes_file=bool(content)),
    )


class _Reader:
    """Reads JSON schemas as lists of fields."""

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        self._schemas = schemas

    def parameter(self, given: Mapping[str, Any]) -> Field:
        """Return a parameter as a field."""
        schema = given["schema"]
        place = "" if given["in"] == "query" else f" in the {given['in']}"
        return Field(
            name=given["name"],
            type=f"{self._type(schema)}{place}",
            is_required=given.get("required", False),
            default=_default(schema),
            text=_marked(given.get("description") or schema.get("description", "")),
        )

    def fields(self, schema: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[Field]:
        """Yield the fields of an object, those of objects in it after their own name."""
        found = self._resolved(schema)
        required = found.get("required", [])
        for name, inner in found.get("properties", {}).items():
            yield Field(
                name=prefix + name,
                type=self._type(inner),
                is_required=name in required,
                default=_default(inner),
                text=_marked(inner.get("description", "")),
            )
            nested, mark = self._object_in(inner)
            if nested is not None and depth < _MAX_DEPTH:
                yield from self.fields(nested, f"{prefix}{name}{mark}.", depth + 1)

    def _object_in(self, schema: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
        found = self._resolved(schema)
        for option in found.get("anyOf", [found]):
            inner = self._resolved(option)
            if inner.get("type") == "array":
                nested, _ = self._object_in(inner.get("items", {}))
                return nested, "[]"
            if "properties" in inner:
                return inner, ""
        return None, ""

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        if "allOf" in schema and len(schema["allOf"]) == 1:
            return self._resolved(schema["allOf"][0])
        if "$ref" in schema:
            found: Mapping[str, Any] = self._schemas[schema["$ref"].rpartition("/")[2]]
            return found
        return schema

    def _type(self, schema: Mapping[str, Any]) -> str:
        found = self._resolved(schema)
        if "anyOf" in found:
            return " or ".join(dict.fromkeys(self._type(option) for option in found["anyOf"]))
        if "const" in found:
            return json.dumps(found["const"])
        if "enum" in found:
            return " | ".join(map(str, found["enum"]))
        if found.get("type") == "array":
            return f"list of {self._type(found.get('items', {}))}"
        return f"{found.get('format') or found.get('type', 'any value')}{_limits(found)}"


def _marked(text: str) -> SafeString:
    """Return a text in which what stands between backticks is code."""
    plain, *marked = text.split("`")
    parts = [format_html("{}", plain)]
    parts += [
        format_html("<code>{}</code>" if index % 2 == 0 else "{}", part) for index, part in enumerate(marked)
    ]
    return format_html_join("", "{}", ((part,) for part in parts))


def _limits(schema: Mapping[str, Any]) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is None and high is None:
        return ""
    above = ">" if "exclusiveMinimum" in schema else ""
    if high is None:
        return f", {above or 'from'} {low}"
    return f", {above}{0 if low is None else low} to {high}"


def _default(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema["default"]) if "default" in schema else ""


def _curl(
    method: str, path: str, operation: Mapping[str, Any], base: str, *, has_body: bool, takes_file: bool
) -> str:
    name = operation["operationId"]
    address = re.sub(r"\{(\w+)\}", lambda match: _EXAMPLE_IDS[match[1]], path)
    query = _EXAMPLE_QUERIES.get(name, "")
    lines = [
        "curl -sS"
        + ("" if method == "get" else f" -X {method.upper()}")
        + ' -H "X-API-Key: $MINTWEB_API_KEY"'
    ]
    if has_body:
        lines.append("  -H 'Content-Type: application/json'")
        lines.append(f"  -d '{json.dumps(_EXAMPLES.get(name, {}))}'")
    elif takes_file:
        lines.append("  -F file=@rows.jsonl")
    if name in ("download_checkpoint", "export_metrics"):
        lines.append("  -OJ")
    lines.append(f"  '{base}{address}{query}'")
    return " \\\n".join(lines)
