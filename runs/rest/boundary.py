"""What every request of the REST API goes through: its id, the key, strict parameters, replays, ETags, errors.

`outer` wraps a whole address and turns whatever happens into an answer of one form; `checked` wraps one
operation, before Ninja validates and calls it.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Final, cast

from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.http.response import HttpResponseBase
from django.utils.cache import patch_vary_headers
from ninja.operation import Operation
from ninja.security import APIKeyHeader, HttpBearer
from pydantic import BaseModel

from runs.exceptions import MethodNotAllowed, NotAuthenticated, NotFound, PreconditionFailed, RequestInvalid
from runs.models import User
from runs.rest import bodies, errors
from runs.rest.rendering import etag_of, etag_of_model
from runs.schemas.problems import show
from runs.services import access, idempotency, keys
from runs.services.idempotency import Answer

View = Callable[..., HttpResponseBase]
Run = Callable[..., HttpResponseBase]
_operators_views: Final[set[str]] = set()
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_IDEMPOTENCY_KEY: Final = re.compile(r"[!-~]{1,255}")


class BearerKey(HttpBearer):
    """Tells the schema of `Authorization: Bearer tml-...`; `checked` has looked at the key already."""

    def authenticate(self, request: HttpRequest, token: str) -> User | None:
        """Return the key's owner."""
        return caller(request)


class HeaderKey(APIKeyHeader):
    """Tells the schema of `X-API-Key: tml-...`."""

    param_name = "X-API-Key"

    def authenticate(self, request: HttpRequest, key: str | None) -> User | None:
        """Return the key's owner."""
        return caller(request)


def caller(request: HttpRequest) -> User:
    """Return the owner of the request's key."""
    user: User = request.META["mintweb.caller"]
    return user


def upload_of(request: HttpRequest) -> bodies.Upload:
    """Return the file that came with the request."""
    upload: bodies.Upload = request.META["mintweb.upload"]
    return upload


def takes_upload(view: Callable[..., Any]) -> Callable[..., Any]:
    """Mark an operation whose body is a file."""
    view.takes_upload = True  # type: ignore[attr-defined]
    return view


def tells_secret(view: Callable[..., Any]) -> Callable[..., Any]:
    """Mark an operation whose answer is not to be kept for a replay."""
    view.tells_secret = True  # type: ignore[attr-defined]
    return view


def operators_only(view: Callable[..., Any]) -> Callable[..., Any]:
    """Mark an operation that asks for the key of a person with staff rights."""
    _operators_views.add(view.__name__)
    return view


def policy_of(view_name: str) -> str:
    """Return who may use the operation of this name."""
    return "operator key" if view_name in _operators_views else "key"


def outer(view: View, *, policy: str = "key") -> View:
    """Wrap an address."""

    @wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        given = request.headers.get("x-request-id", "")
        request.META["mintweb.request_id"] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:16]
        try:
            response = view(request, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the boundary: whatever it was, the client gets JSON
            response = errors.from_exception(request, error)
        if isinstance(response, HttpResponseNotAllowed):
            response = _not_allowed(request, response)
        if isinstance(response, HttpResponse):
            response = _conditional(request, response)
        response["X-Request-Id"] = errors.request_id_of(request)
        patch_vary_headers(response, ["Authorization", "X-API-Key"])
        return response

    guarded.policy = policy  # type: ignore[attr-defined]
    guarded.csrf_exempt = True  # type: ignore[attr-defined] # no cookie opens any of this
    return guarded


def checked(run: Run) -> Run:
    """Wrap an operation; Ninja gives it as the bound method `run`."""
    operation = cast(Operation, run.__self__)  # type: ignore[attr-defined]
    view = operation.view_func
    names, lists = _query_names(operation)

    @wraps(run)
    def guarded(request: HttpRequest, **path_args: Any) -> HttpResponseBase:
        request.META["mintweb.caller"] = _authenticated(request)
        if view.__name__ in _operators_views:
            access.check_operator(caller(request))
        if any("\0" in str(arg) for arg in path_args.values()):  # no text of PostgreSQL's holds one
            raise NotFound
        _check_query(request, names, lists)
        upload = bodies.receive_upload(request) if hasattr(view, "takes_upload") else None
        request.META["mintweb.upload"] = upload
        try:
            key = request.headers.get("idempotency-key") if request.method == "POST" else None
            if key is None:
                return run(request, **path_args)
            return _once(request, view, key, lambda: run(request, **path_args))
        finally:
            if upload is not None:
                upload.close()

    return guarded


def check_match(request: HttpRequest, current: BaseModel) -> None:
    """Check If-Match against the object as a GET would answer it now.

    Raises:
        PreconditionFailed: it is another object by now.
    """
    asked = request.headers.get("if-match", "*")
    if asked.strip() != "*" and etag_of_model(current) not in _tags(asked):
        raise PreconditionFailed(place="If-Match")


def nowhere(request: HttpRequest, **_: str) -> HttpResponseBase:
    """Answer for an address that is none."""
    raise NotFound(f"there is nothing at {show(request.path)}; /rest/v1/docs lists what there is")


def _authenticated(request: HttpRequest) -> User:
    headers = request.headers
    credential = keys.sent_in(headers.get("x-api-key", ""), headers.get("authorization", ""))
    if not credential:
        raise NotAuthenticated("a key is needed")
    return keys.authenticate(credential)


def _query_names(operation: Operation) -> tuple[set[str], set[str]]:
    """Return the names of the query parameters that an operation knows, and of those that may come often."""
    if hasattr(operation.view_func, "takes_upload"):
        return {"name", "description", "filename"}, set()
    names: set[str] = set()
    lists: set[str] = set()
    for model in operation.models:
        if model.__ninja_param_source__ == "query":
            names |= set(getattr(model, "__ninja_flatten_map__", {}))
            lists |= set(getattr(model, "__ninja_collection_fields__", []))
    return names, lists


def _check_query(request: HttpRequest, names: set[str], lists: set[str]) -> None:
    allowed = ", ".join(sorted(names)) or "none"
    problems: list[tuple[str, str]] = []
    for name, values in request.GET.lists():
        if name not in names:
            problems.append((name[:80], f"unknown query parameter {show(name)}; allowed: {allowed}"))
        elif len(values) > 1 and name not in lists:
            problems.append((name, f"given {len(values)} times; it is taken once"))
        elif any("\0" in value for value in values):
            problems.append((name, "must not hold NUL"))
    if problems:
        raise RequestInvalid(problems[0][1], place=problems[0][0], problems=problems[:20])


def _once(
    request: HttpRequest, view: object, key: str, run: Callable[[], HttpResponseBase]
) -> HttpResponseBase:
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise RequestInvalid("must be 1 to 255 printable ASCII characters", place="Idempotency-Key")
    if hasattr(view, "tells_secret"):
        raise RequestInvalid(
            "is not taken here: the answer holds a secret and is not kept", place="Idempotency-Key"
        )
    fresh: list[HttpResponse] = []

    def answer() -> Answer:
        response = run()
        assert isinstance(response, HttpResponse), "no POST is answered by a stream"
        fresh.append(response)
        return Answer(status=response.status_code, body=response.content)

    upload = request.META["mintweb.upload"]
    given = idempotency.once(
        caller(request),
        key,
        digest=bodies.digest_of(request, upload),
        answer=answer,
        is_atomic=upload is None,  # moving a large file is no work for inside a transaction
    )
    if not given.is_replay:
        return fresh[0]
    replayed = HttpResponse(given.body, status=given.status, content_type="application/json")
    replayed["Idempotency-Replayed"] = "true"
    return replayed


def _not_allowed(request: HttpRequest, refused: HttpResponseBase) -> HttpResponse:
    allowed = refused["Allow"]
    response = errors.reply(request, MethodNotAllowed(f"use {allowed} here, not {request.method}"))
    response["Allow"] = allowed
    return response


def _conditional(request: HttpRequest, response: HttpResponse) -> HttpResponse:
    if "Cache-Control" not in response:
        response["Cache-Control"] = "private, no-cache" if request.method == "GET" else "no-store"
    if request.method != "GET" or response.status_code != 200:
        return response
    tag = response["ETag"] = etag_of(response.content)
    asked = request.headers.get("if-none-match", "")
    if asked.strip() == "*" or tag in _tags(asked):
        unchanged = HttpResponse(status=304)
        del unchanged["Content-Type"]
        unchanged["ETag"] = tag
        unchanged["Cache-Control"] = response["Cache-Control"]
        return unchanged
    return response


def _tags(header: str) -> Iterable[str]:
    return [tag.strip().removeprefix("W/") for tag in header.split(",")]
