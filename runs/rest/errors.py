"""The one form of every error of the REST API, and how each exception becomes one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from django.core.exceptions import BadRequest, RequestDataTooBig, SuspiciousOperation
from django.db import InterfaceError, OperationalError
from django.http import HttpRequest, HttpResponse
from django.http.multipartparser import MultiPartParserError
from ninja.errors import HttpError, ValidationError
from pydantic import BaseModel, Field

from runs.exceptions import (
    MintError,
    NotAuthenticated,
    PayloadTooLarge,
    RequestInvalid,
)
from runs.rest.rendering import to_json
from runs.schemas.problems import place_of

logger = logging.getLogger(__name__)

HINTS: Final[Mapping[str, str]] = {
    "not_authenticated": "send a key as Authorization: Bearer tml-..., made on the settings page",
    "operators_only": "use the key of the first user, admin, or of another account with staff rights",
    "not_found": "what belongs to somebody else looks as if it did not exist",
    "method_not_allowed": "the header Allow lists the methods of this address",
    "payload_too_large": "large files go to POST /rest/v1/datasets or, in parts, to /rest/v1/uploads/",
    "unsupported_media": "JSON goes as application/json; /rest/v1/docs lists what each address takes",
    "precondition_failed": "read the object again and send its new ETag",
    "still_answering": "repeat the same request with the same Idempotency-Key",
    "rate_limited": "wait as many seconds as Retry-After says",
    "unavailable": "wait as many seconds as Retry-After says",
    "server_error": "the server's log names this request_id",
}
_RETRY_LATER: Final = (409, 429, 503)


class Problem(BaseModel):
    """One thing that is wrong and where."""

    place: str = Field(description="The field or parameter, as `lora.rank`; empty for the whole request.")
    message: str


class ErrorBody(BaseModel):
    """What went wrong."""

    code: str = Field(description="Which kind of error, for programs.")
    message: str = Field(description="What is wrong, for people.")
    place: str = Field(description="The first place that is wrong, or empty.")
    hint: str = Field(description="What to do about it, or empty.")
    request_id: str = Field(description="The answer's X-Request-Id; the server's log names it.")
    problems: list[Problem] = Field(description="Everything that is wrong, at most 20.")


class ErrorReply(BaseModel):
    """The body of every 4xx and 5xx."""

    error: ErrorBody


class Unavailable(MintError):
    """the database is not reachable just now; send the request again"""

    code = "unavailable"
    http_status = 503


def request_id_of(request: HttpRequest) -> str:
    """Return the id that `boundary` gave the request."""
    return str(request.META.get("mintweb.request_id", ""))


def reply(request: HttpRequest, error: MintError) -> HttpResponse:
    """Answer with an error."""
    if isinstance(error, RequestInvalid):
        problems: Sequence[tuple[str, str]] = error.problems
    else:
        problems = ((error.place, error.message),)
    body = ErrorReply(
        error=ErrorBody(
            code=error.code,
            message=error.message,
            place=error.place,
            hint=HINTS.get(error.code, ""),
            request_id=request_id_of(request),
            problems=[Problem(place=place, message=message) for place, message in problems],
        )
    )
    response = HttpResponse(
        to_json(body.model_dump()), status=error.http_status, content_type="application/json"
    )
    if error.http_status in _RETRY_LATER:
        response["Retry-After"] = "1"
    if isinstance(error, NotAuthenticated):
        response["WWW-Authenticate"] = 'Bearer realm="mintweb"'
    return response


def from_exception(request: HttpRequest, error: Exception) -> HttpResponse:
    """Answer with whatever an operation raised; a surprise is logged and told as a 500."""
    return reply(request, as_mint_error(request, error))


def as_mint_error(request: HttpRequest, error: Exception) -> MintError:
    """Return the error in our own terms."""
    if isinstance(error, MintError):
        return error
    if isinstance(error, HttpError) and isinstance(error.__cause__, MintError):
        return error.__cause__  # Ninja wraps what its parser raises
    if isinstance(error, ValidationError):
        return _invalid(error.errors)
    if isinstance(error, RequestDataTooBig):
        return PayloadTooLarge()
    if isinstance(error, MultiPartParserError | BadRequest | SuspiciousOperation):
        return RequestInvalid(f"the request cannot be read: {error}")
    if isinstance(error, OperationalError | InterfaceError):
        logger.warning("the database did not answer: %s", error)
        return Unavailable()
    logger.error(
        "request %s failed at %s %s", request_id_of(request), request.method, request.path, exc_info=error
    )
    return MintError("the server failed")


def _invalid(errors: Sequence[Mapping[str, Any]]) -> RequestInvalid:
    problems = [(_place(details), _message(details)) for details in errors[:20]]
    (place, message), *others = problems
    if others:
        listed = "; ".join(f"{where}: {what}" if where else what for where, what in others)
        message = f"{message} (1 of {len(errors)} errors, then {listed})"
    return RequestInvalid(message, place=place, problems=problems)


def _place(details: Mapping[str, Any]) -> str:
    source, *steps = details["loc"]
    # The body's own name in the view says nothing to a client.
    return place_of(steps[1:] if source == "body" else steps)


def _message(details: Mapping[str, Any]) -> str:
    if details["type"] == "missing":
        return "is missing" if _place(details) else "the body is empty; a JSON object was expected"
    if details["type"] == "model_type":
        return "must be a JSON object"
    if details["type"] == "value_error":
        return str(details["ctx"]["error"])
    message = str(details["msg"]).replace("Input should be", "must be").replace("Input should", "must")
    return f"{message[:1].lower()}{message[1:]}"
