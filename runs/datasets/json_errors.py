"""Says in words what is wrong with a line that is not one JSON object."""

from __future__ import annotations

import re
from typing import Final

import orjson

from runs.datasets.encodings import not_utf8
from runs.datasets.problems import Problem, excerpt_of, quoted

_NAN: Final = re.compile(r"-?(NaN|Infinity|inf\b|nan\b)")
_PYTHON: Final = re.compile(r"None|True|False")
_ONE_A_LINE: Final = "write one JSON object a line (`json.dumps(row)` and a line break)"
_MEND: Final = "correct the line, or write it again with `json.dumps(row)`"
_CUT_OFF: Final = "the file was probably cut off: export or upload it again, or leave this row out"


def parse_line(raw: bytes, line: int, *, is_last: bool = False) -> object:
    """Return the value on a line, its problem, or None for a blank line.

    Args:
        is_last: the line has no line end, so an unfinished value means that the file was cut off.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return explain(raw, error, line, is_last=is_last) if raw.strip() else None


def explain(raw: bytes, error: orjson.JSONDecodeError, line: int, *, is_last: bool) -> Problem:
    """Return the problem of a line that orjson refuses."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as not_text:
        if is_last and not_text.end == len(raw) and not_text.reason == "unexpected end of data":
            return _problem(
                "truncated_last_line", _CUT_REASON, _CUT_OFF, line, raw.decode(errors="ignore"), 0
            )
        return not_utf8(raw, not_text, line)
    position = error.pos
    code, reason, fix = _reason(text, position, error.msg, is_last=is_last)
    return _problem(code, reason, fix, line, text, position)


_CUT_REASON: Final = "the last line ends in the middle of a row"


def _problem(code: str, reason: str, fix: str, line: int, text: str, position: int) -> Problem:
    excerpt = excerpt_of(text, position)
    return Problem(code=code, reason=reason, fix=fix, line=line, column=position + 1, excerpt=excerpt)


def _reason(text: str, position: int, message: str, *, is_last: bool) -> tuple[str, str, str]:
    """Return code, reason and fix for a text that stops being JSON at a position."""
    if "end of data" in message:
        if is_last:
            return "truncated_last_line", _CUT_REASON, _CUT_OFF
        return "unfinished_row", "the line ends in the middle of a row", _ONE_A_LINE
    if "content after document" in message:
        return _after(text[position:].lstrip())
    if "surrogate" in message or "hex escape" in message:
        fix = "write the text again as UTF-8 (an emoji was cut in half), or delete the escape"
        return "lone_surrogate", "half of a surrogate pair stands alone (a \\ud800-like escape)", fix
    if "control character" in message:
        return _control(text[position])
    if "depth limit" in message:
        return "too_deep", "the row is nested more than 1,000 levels deep", "flatten the row"
    if "infinity" in message:
        return "not_a_number", "a number is too large", "use a smaller number, null or a text"
    return _literal(text, position, message)


def _after(rest: str) -> tuple[str, str, str]:
    if rest.startswith(("{", "[")):
        return "two_objects", "a second JSON value starts on the same line", _ONE_A_LINE
    if rest.startswith(","):
        if rest.strip() == ",":
            return "trailing_comma", "a comma follows the object", "end each line right after its object"
        return "two_objects", "a second value follows after a comma on the same line", _ONE_A_LINE
    return "trailing_text", f"text follows the object: {quoted(rest)}", "end each line right after its object"


def _control(character: str) -> tuple[str, str, str]:
    if character == "\0":
        fix = "the file is damaged here (often a hole left by a crash): write it again, or leave this row out"
        return "nul_character", "a NUL byte stands in the row", fix
    reason = f"an unescaped control character {quoted(character)} stands in a text"
    return "control_character", reason, "write it as \\n or \\t; `json.dumps(row)` does"


def _literal(text: str, position: int, message: str) -> tuple[str, str, str]:
    rest = text[position:]
    near = text[max(0, position - 3) : position + 9]
    if found := _NAN.match(text, position - 1) or _NAN.match(rest) or _NAN.search(near):
        return (
            "not_a_number",
            f"{found[0]} is no JSON value",
            "replace NaN and Infinity by null or a number",
        )
    if rest.startswith("'"):
        return (
            "single_quotes",
            "a text is in single quotes, as Python prints it",
            f"use double quotes: {_MEND}",
        )
    if match := _PYTHON.match(rest) or _PYTHON.match(text[max(0, position - 1) :]):
        return "python_literal", f"{match[0]} is Python, not JSON", "write null, true or false"
    if "trailing comma" in message:
        return "trailing_comma", "a comma stands before the closing bracket", "delete that comma"
    if position == 0:
        return "not_json", f"the line does not start a JSON object: {quoted(rest)}", _ONE_A_LINE
    return "not_json", f"{message} near {quoted(rest[:40])}", _MEND
