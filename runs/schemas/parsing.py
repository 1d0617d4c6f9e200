"""The one JSON parser of the whole API: strict, fast on megabytes, and exact about what is wrong where.

`parse_json` turns bytes into plain objects that are safe to store (no NaN, no NUL, no lone surrogate,
no deep nesting); `validate` goes on to a pydantic model. Every failure is a RequestInvalid.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from runs.exceptions import RequestInvalid
from runs.schemas.encodings import decompress
from runs.schemas.problems import Problems, place_of, show

__all__ = ["decompress", "parse_json", "validate", "validate_object"]

ModelT = TypeVar("ModelT", bound=BaseModel)

MAX_DEPTH = 64
MAX_NUMBER_DIGITS = 300

# Possessive, so an unterminated string costs one pass and never backtracks.
_STRING = r'"(?:[^"\\]++|\\.)*+"?'
_STRINGS = re.compile(_STRING.encode(), re.DOTALL)
_TOKENS = re.compile(
    rf"(?P<string>{_STRING})|(?P<open>[\[{{])|(?P<close>[\]}}])|(?P<constant>NaN|-?Infinity)"
    r"|(?P<number>-?[0-9]++(?:\.[0-9]++)?[eE]\+?[0-9]{3,}+|[0-9]{301,}+)".encode(),
    re.DOTALL,
)
_SURROGATES = re.compile(
    rb"\\(?:u([dD][89abAB][0-9a-fA-F]{2})(\\u[dD][c-fC-F][0-9a-fA-F]{2})?|(u[dD][c-fC-F]..)|.)"
)
_NUL = re.compile(rb"\\(?:(u0000)|.)", re.DOTALL)

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789E", b"000000000e")
# With every digit made 0, how a number looks that may be too large: 1e999, but not 1e-999.
_OVERFLOW_SIGNS = (b"e000", b"e+000", b"0" * (MAX_NUMBER_DIGITS + 1))


_SCALARS = frozenset({int, float, str, bool, type(None)})


class _DuplicateKeyError(Exception):
    """An object names one key twice."""


def parse_json(body: bytes) -> object:
    """Return the value that the JSON text holds.

    Raises:
        RequestInvalid: `place` is the line and column, where there is one.
    """
    _check_text(body)
    skeleton = _STRINGS.sub(b"", body)
    if _depth(skeleton) > MAX_DEPTH or b"N" in skeleton or b"I" in skeleton or _may_overflow(skeleton):
        _check_tokens(body)
    try:
        value: object = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        _explain(body)
        raise RequestInvalid(f"not valid JSON: {error}") from error
    # Outside strings a colon only follows a key, so fewer keys than colons means one came twice.
    if skeleton.count(b":") != _count_keys(value):
        _explain(body)
    return value


def validate(model_class: type[ModelT], body: bytes) -> ModelT:
    """Return the body as the wire model.

    Raises:
        RequestInvalid: not JSON, or not this model; names up to 20 places and the total.
    """
    return validate_object(model_class, parse_json(body))


def validate_object(model_class: type[ModelT], value: object, *, prefix: str = "") -> ModelT:
    """Return a parsed JSON value as the wire model; `prefix` is put before each place."""
    if not isinstance(value, dict):
        raise RequestInvalid(f"must be a JSON object, got {show(value)}", place=prefix)
    try:
        return model_class.model_validate(value)
    except ValidationError as error:
        problems = Problems()
        for details in error.errors(include_url=False):
            problems.add(_message(details), place=place_of(details["loc"], prefix))
        problems.raise_if_any()
        raise


def _message(details: ErrorDetails) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context["error"])
    message = details["msg"].replace("Input should be", "must be").replace("Input should", "must")
    message = message.replace("String should", "must")
    message = message.partition(", unable to parse string")[0]
    secret = any("token" in str(step) and isinstance(value, str) for step in details["loc"])
    got = "" if secret else f", got {show(value)}"
    return f"{message[:1].lower()}{message[1:]}{got}"


def _check_text(body: bytes) -> None:
    if not body.strip(b" \t\r\n"):
        raise RequestInvalid("the body is empty, JSON was expected")
    if body.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in body[:4]:
        raise RequestInvalid("the body is UTF-16 or UTF-32, send UTF-8", place="line 1, column 1")
    if body.startswith(b"\xef\xbb\xbf"):
        raise RequestInvalid(
            "the body starts with a byte order mark, send plain UTF-8", place="line 1, column 1"
        )
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError as error:
            raise RequestInvalid(
                f"byte 0x{body[error.start]:02x} is not valid UTF-8",
                place=_line_and_column(body, error.start),
            ) from error
    if b"\\u" in body:
        _check_escapes(body)


def _check_escapes(body: bytes) -> None:
    """Refuse what PostgreSQL and UTF-8 cannot hold: NUL and half a surrogate pair."""
    if b"\\u0000" in body:
        for match in _NUL.finditer(body):
            if match[1]:
                raise RequestInvalid(
                    "a string holds NUL (\\u0000)", place=_line_and_column(body, match.start())
                )
    if b"\\ud" in body or b"\\uD" in body:
        for match in _SURROGATES.finditer(body):
            if match[3] or (match[1] and not match[2]):
                raise RequestInvalid(
                    f"a string holds half a surrogate pair ({ascii(match[0][:6].decode('latin-1'))[1:-1]})",
                    place=_line_and_column(body, match.start()),
                )


def _depth(skeleton: bytes) -> int:
    brackets = np.frombuffer(skeleton.translate(None, _NOT_BRACKETS), dtype=np.uint8)
    if brackets.size <= MAX_DEPTH:
        return 0
    # "[" and "{" have bit 1 set and bit 2 clear in 0x5b, 0x7b; "]" and "}" are 0x5d, 0x7d.
    steps = np.where(brackets & 0x02, np.int32(1), np.int32(-1))
    return int(np.cumsum(steps, dtype=np.int32).max())


def _may_overflow(skeleton: bytes) -> bool:
    plain = skeleton.translate(_DIGITS_TO_ZERO)
    return any(sign in plain for sign in _OVERFLOW_SIGNS)


def _check_tokens(body: bytes) -> None:
    """Walk the tokens, slowly, and name the first that is not allowed."""
    depth = 0
    for match in _TOKENS.finditer(body):
        kind = match.lastgroup
        if kind == "open":
            depth += 1
            if depth > MAX_DEPTH:
                raise RequestInvalid(
                    f"nested more than {MAX_DEPTH} levels deep", place=_line_and_column(body, match.start())
                )
        elif kind == "close":
            depth -= 1
        elif kind == "constant":
            raise RequestInvalid(
                f"{match[0].decode()} is not a JSON number", place=_line_and_column(body, match.start())
            )
        elif kind == "number":
            _check_number(match[0], body, match.start())


def _check_number(text: bytes, body: bytes, start: int) -> None:
    if len(text) > MAX_NUMBER_DIGITS:
        rule = f"a number has {len(text)} characters, the limit is {MAX_NUMBER_DIGITS}"
    elif _is_infinite(text):
        rule = f"{text[:80].decode()} is too large for a number"
    else:
        return
    raise RequestInvalid(rule, place=_line_and_column(body, start))


def _is_infinite(text: bytes) -> bool:
    try:
        return float(text) in (float("inf"), float("-inf"))
    except ValueError:  # not a number at all: the parser says so, with its place
        return False


def _explain(body: bytes) -> None:
    """Parse again with the standard parser, slower but with better words, and raise its complaint."""
    try:
        json.loads(body, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise RequestInvalid(
            f"not valid JSON: {error.msg[:1].lower()}{error.msg[1:]}",
            place=f"line {error.lineno}, column {error.colno}",
        ) from error
    except _DuplicateKeyError as error:
        raise RequestInvalid(f"an object has the key {show(error.args[0])} twice") from error


def _count_keys(value: object) -> int:
    """Count the keys of all objects; lists of plain numbers cost one pass in C."""
    if isinstance(value, dict):
        return len(value) + sum(map(_count_keys, value.values()))
    if isinstance(value, list) and not _SCALARS.issuperset(map(type, value)):
        return sum(map(_count_keys, value))
    return 0


def _line_and_column(body: bytes, index: int) -> str:
    before = body[:index]
    start = before.rfind(b"\n") + 1
    column = len(before[start:].decode(errors="replace")) + 1
    line = before.count(b"\n") + 1
    return f"line {line}, column {column}"


def _object(pairs: list[tuple[str, object]]) -> Mapping[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return result
