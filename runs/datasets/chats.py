"""The messages of one conversation: what is wrong with them, and their canonical form."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Final

import orjson

from runs.datasets.problems import RowRefused, quoted

Message = dict[str, Any]
ROLES: Final = ("system", "user", "assistant", "tool")
_ROLES: Final = frozenset(ROLES)
_OTHER_NAMES: Final = {
    "human": "user",
    "customer": "user",
    "client": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "agent": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
# Which role may come before which; "" is the beginning.
_FOLLOWS: Final = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_PAIRS: Final = frozenset((first, second) for first, seconds in _FOLLOWS.items() for second in seconds)
_KNOWN_KEYS: Final = frozenset(("role", "content", "from", "value", "tool_calls", "tool_call_id", "name"))
_ASSISTANT_KEYS: Final = _KNOWN_KEYS | {"weight"}
_TRAINED: Final = "write the text the model should learn, or leave this row out"


class Notes:
    """What should be known about the row at hand although it is good; the doctor empties it after each."""

    def __init__(self) -> None:
        self.codes: list[str] = []

    def add(self, code: str) -> None:
        if code not in self.codes:
            self.codes.append(code)


def kind_of(value: object) -> str:
    """Return what a JSON value is called."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def loaded(value: object) -> object:
    """Return a list or object that is written as JSON in a text (as in CSV), or the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return orjson.loads(value)
        except (orjson.JSONDecodeError, UnicodeEncodeError):
            return value
    return value


def canonical_messages(
    messages: object, field: str, notes: Notes, *, keys: tuple[str, str] = ("role", "content")
) -> list[Message]:
    """Return the messages with known keys only; `weight` only where it is 0, for an answer that is not learned.

    Args:
        keys: what role and content are called in the file, for the field of a problem.

    Raises:
        RowRefused: a role, its order or a content cannot be trained on.
    """
    messages = _message_list(messages, field)
    result: list[Message] = []
    previous = ""
    for index, message in enumerate(messages):
        if message.__class__ is not dict:
            raise _wrong_type(message, f"{field}[{index}]", "an object with role and content")
        role = message.get("role")
        content = message.get("content")
        if role.__class__ is not str or role not in _ROLES:
            raise _bad_role(message, f"{field}[{index}]", keys[0])
        if (previous, role) not in _PAIRS:
            raise _order(role, previous, f"{field}[{index}].{keys[0]}")
        if len(message) == 2 and content.__class__ is str and content and not content.isspace():
            result.append({"role": role, "content": content})
        else:
            result.append(_full(message, f"{field}[{index}]", keys[1], notes))
        if role == "tool" and previous == "assistant" and "tool_calls" not in result[-2]:
            reason = "a tool answers, but the assistant before it called none"
            fix = "add tool_calls to the assistant's message, or leave the tool's message out"
            raise RowRefused("role_order", reason, fix, field=f"{field}[{index}].{keys[0]}")
        previous = role
    return result


def with_assistant(messages: list[Message], field: str, notes: Notes) -> list[Message]:
    """Return the messages of a row that is trained on.

    Raises:
        RowRefused: no message is the assistant's, or all of those have weight 0.
    """
    if messages[-1]["role"] != "assistant":
        if not any(message["role"] == "assistant" for message in messages):
            reason = "there is no assistant message, so there is nothing to learn"
            raise RowRefused("no_assistant", reason, "add the assistant's answer", field=field)
        notes.add("unanswered_end")
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        reason = "every assistant message has weight 0, so there is nothing to learn"
        fix = "give one of them weight 1, or leave this row out"
        raise RowRefused("no_weight", reason, fix, field=field)
    return messages


def _message_list(messages: object, field: str) -> Sequence[Any]:
    messages = loaded(messages)
    if not isinstance(messages, list):
        raise _wrong_type(messages, field, "a list of messages")
    if not messages:
        raise RowRefused("empty_messages", "the list of messages is empty", _TRAINED, field=field)
    return messages


def _full(message: Message, field: str, content_key: str, notes: Notes) -> Message:
    """Return a message that is more than role and text."""
    role = message["role"]
    result: Message = {"role": role}
    calls = message.get("tool_calls") or None
    result["content"] = _content(message, f"{field}.{content_key}", notes, may_be_empty=bool(calls))
    if calls is not None:
        if role != "assistant":
            reason = f"tool_calls stand in a message of {quoted(role)}"
            raise RowRefused(
                "wrong_type", reason, "only the assistant calls tools", field=f"{field}.tool_calls"
            )
        result["tool_calls"] = canonical_calls(calls, f"{field}.tool_calls")
    for name in ("tool_call_id", "name"):
        if isinstance(message.get(name), str):
            result[name] = message[name]
    known = _KNOWN_KEYS
    if role == "assistant":
        known = _ASSISTANT_KEYS
        if _weight(message.get("weight"), f"{field}.weight") == 0:
            result["weight"] = 0
    if any(name not in known and value is not None for name, value in message.items()):
        notes.add("unused_message_keys")
    return result


def _weight(weight: object, field: str) -> int:
    """Return whether an answer is learned, 1 or 0; without a weight it is."""
    if weight is None:
        return 1
    # True and False are numbers to Python; tables write whole numbers as 0.0 and 1.0.
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        reason = f"the weight is {quoted(weight)}, not 0 or 1"
        fix = "write 0 for an answer that is not to be learned, 1 for one that is, or leave it out"
        raise RowRefused("bad_weight", reason, fix, field=field)
    return int(weight)


def _content(message: Message, field: str, notes: Notes, *, may_be_empty: bool) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = _joined(content, field, notes)
    if content is None:
        if may_be_empty:
            return ""
        what = "null" if "content" in message or "value" in message else "missing"
        raise RowRefused("null_content", f"the content is {what}", _TRAINED, field=field)
    if not isinstance(content, str):
        raise _wrong_type(content, field, "a text")
    may_be_empty = may_be_empty or message["role"] in ("tool", "system")
    if not may_be_empty and (not content or content.isspace()):
        reason = "the content is empty" if not content else "the content is only white space"
        raise RowRefused("empty_content", reason, _TRAINED, field=field)
    return content


def _joined(parts: list[Any], field: str, notes: Notes) -> str:
    """Return the text of a content given in parts."""
    texts = []
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            what = quoted(part.get("type")) if isinstance(part, dict) else kind_of(part)
            reason = f"the content is a list with a part that is no text ({what})"
            fix = "only text can be trained: write the content as one text, or leave this row out"
            raise RowRefused("content_list", reason, fix, field=f"{field}[{index}]")
        texts.append(text)
    notes.add("content_parts")
    return "".join(texts)


def canonical_calls(calls: object, field: str) -> list[Message]:
    """Return tool calls with their arguments as an object, as chat templates expect them.

    Raises:
        RowRefused: a call has no name, or its arguments are not a JSON object.
    """
    calls = loaded(calls)
    if not isinstance(calls, list):
        raise _wrong_type(calls, field, "a list of tool calls")
    return [_call(call, f"{field}[{index}]") for index, call in enumerate(calls)]


def _call(call: object, field: str) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(call, dict):
        raise _wrong_type(call, field, 'an object such as {"name": ..., "arguments": {...}}')
    name = function.get("name")
    if not isinstance(name, str) or not name:
        fix = "give the name of the tool that is called"
        raise RowRefused("tool_call", f"the tool's name is {quoted(name)}", fix, field=f"{field}.name")
    arguments = loaded(function.get("arguments", {}))
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        reason = f"the arguments are {quoted(arguments)}, not a JSON object"
        fix = 'write them as an object, such as {"city": "Paris"}'
        raise RowRefused("tool_call", reason, fix, field=f"{field}.arguments")
    result: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call["id"], **result} if isinstance(call.get("id"), str) else result


def _bad_role(message: Message, field: str, key: str) -> RowRefused:
    role = message.get("role")
    allowed = ", ".join(ROLES)
    field = f"{field}.{key}"
    if role is None:
        fix = f"give each message a {key}: {allowed}"
        return RowRefused("missing_role", f"the message has no {key}", fix, field=field)
    if not isinstance(role, str):
        return _wrong_type(role, field, f"one of {allowed}")
    meant = _meant(role)
    fix = f'did you mean "{meant}"?' if meant else f"use one of {allowed}"
    return RowRefused("unknown_role", f"the role {quoted(role)} is none of {allowed}", fix, field=field)


def _meant(role: str) -> str:
    name = role.strip().lower()
    if name in _ROLES:
        return name
    return _OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, ROLES, 1, 0.6)), "")


def _order(role: str, previous: str, field: str) -> RowRefused:
    if role == "system":
        reason, fix = (
            "a system message stands after the beginning",
            "put it first, or make it part of a user message",
        )
    elif not previous:
        reason, fix = f"the conversation starts with {quoted(role)}", "start with system or user"
    else:
        reason = f"{quoted(role)} follows {quoted(previous)}"
        fix = f"after {quoted(previous)} comes {' or '.join(_FOLLOWS[previous])}; join messages of the same role"
    return RowRefused("role_order", reason, fix, field=field)


def _wrong_type(value: object, field: str, wanted: str) -> RowRefused:
    reason = (
        f"this is {kind_of(value)}, {quoted(value)}, not {wanted}" if value is not None else "this is null"
    )
    return RowRefused("wrong_type", reason, f"write {wanted}", field=field)
