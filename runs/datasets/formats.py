"""Recognises how the rows of a file are laid out, and makes the canonical row of each.

Wins from top to bottom: preference (chosen, rejected), messages, sharegpt (conversations), completion
(prompt, completion), alpaca (instruction, input, output), prompts (question, answer), text.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from runs.datasets import chats, preferences
from runs.datasets.chats import Message, Notes, canonical_messages, kind_of, loaded, with_assistant
from runs.datasets.problems import FileRefused, Problem, RowRefused, quoted

Row = dict[str, Any]
_SHAREGPT_ROLES: Final = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How rows of a file are read: the format, and which column holds which of its parts."""

    format: str
    columns: Mapping[str, str]
    notes: Notes = field(default_factory=Notes)

    @property
    def kind(self) -> str:
        """What the canonical rows hold."""
        return FORMATS[self.format].kind

    def canonical(self, row: object) -> Row:
        """Return the canonical row.

        Raises:
            RowRefused: the row cannot be used.
        """
        if row.__class__ is not dict:
            fix = 'write each row as an object, such as {"prompt": "...", "completion": "..."}'
            raise RowRefused("not_an_object", f"the row is {kind_of(row)}, {quoted(row)}", fix)
        assert isinstance(row, dict)
        columns = self.columns
        for part in FORMATS[self.format].required:
            if columns[part] not in row:
                raise self._missing(row, columns[part])
        return FORMATS[self.format].make(row, self)

    def text(self, row: Row, part: str, *, may_be_empty: bool = False) -> str:
        """Return a part that has to be a text."""
        return text_of(row.get(self.columns[part]), self.columns[part], may_be_empty=may_be_empty)

    def _missing(self, row: Row, column: str) -> RowRefused:
        other = format_of(row)
        if other and other.format != self.format:
            reason = f"the row is {other.format}, the file {self.format}: column {quoted(column)} is missing"
            return RowRefused("mixed_formats", reason, "keep rows of one format in a file", field=column)
        names = ", ".join(quoted(str(name)) for name in list(row)[:10]) or "none"
        close = difflib.get_close_matches(column, [str(name) for name in row], 1)
        fix = f'did you mean "{column}" by {quoted(close[0])}?' if close else "add it, or leave this row out"
        return RowRefused(
            "missing_column", f"{quoted(column)} is missing; there is {names}", fix, field=column
        )


@dataclass(frozen=True, kw_only=True)
class Format:
    """One layout. `parts` names the columns that are taken for each part; those not required may be absent."""

    kind: str
    parts: Mapping[str, Sequence[str]]
    required: Sequence[str]
    make: Callable[[Row, Plan], Row]


def text_of(value: object, column: str, *, may_be_empty: bool = False) -> str:
    """Return a value that has to be a text.

    Raises:
        RowRefused: it is something else, or empty.
    """
    if isinstance(value, str):
        if may_be_empty or (value and not value.isspace()):
            return value
        fix = "write the text, or leave this row out"
        raise RowRefused("empty_content", "the text is empty", fix, field=column)
    if value is None:
        raise RowRefused(
            "null_content", "the text is null", "write the text, or leave this row out", field=column
        )
    reason = f"this is {kind_of(value)}, {quoted(value)}, not a text"
    raise RowRefused("wrong_type", reason, "write it as a text", field=column)


def _messages(row: Row, plan: Plan) -> Row:
    column = plan.columns["messages"]
    messages = with_assistant(canonical_messages(row[column], column, plan.notes), column, plan.notes)
    return _with_tools({"messages": messages}, row, plan)


def _with_tools(result: Row, row: Row, plan: Plan) -> Row:
    column = plan.columns.get("tools")
    tools = loaded(row.get(column)) if column else None
    if not tools or column is None:
        return result
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        reason = f"this is {kind_of(tools)}, {quoted(tools)}, not a list of tools"
        raise RowRefused("wrong_type", reason, "write a list of JSON schemas of functions", field=column)
    return result | {"tools": tools}


def _sharegpt(row: Row, plan: Plan) -> Row:
    column = plan.columns["conversations"]
    turns = loaded(row[column])
    keys = ("from", "value")
    if isinstance(turns, list):
        if turns and isinstance(turns[0], dict) and "from" not in turns[0] and "role" in turns[0]:
            keys = ("role", "content")
        turns = [_turn(turn, f"{column}[{index}]", keys) for index, turn in enumerate(turns)]
        system = row.get(plan.columns.get("system", ""))
        if isinstance(system, str) and system and turns and turns[0] is not None:
            turns = [{"role": "system", "content": system}, *turns]
    messages = canonical_messages(turns, column, plan.notes, keys=keys)
    return _with_tools({"messages": with_assistant(messages, column, plan.notes)}, row, plan)


def _turn(turn: object, field: str, keys: tuple[str, str]) -> object:
    """Return a turn as a message; what is wrong with it is left for the check of messages."""
    if not isinstance(turn, dict):
        return turn
    speaker, value = turn.get(keys[0]), turn.get(keys[1])
    rest = {name: one for name, one in turn.items() if name not in keys}
    if speaker == "function_call":
        calls = loaded(value)
        calls = calls if isinstance(calls, list) else [calls]
        called = chats.canonical_calls(calls, f"{field}.value")
        return {**rest, "role": "assistant", "content": "", "tool_calls": called}
    role = _SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": value, **rest}


def _completion(row: Row, plan: Plan) -> Row:
    return {
        "prompt": plan.text(row, "prompt", may_be_empty=True),
        "completion": plan.text(row, "completion"),
    }


def _chat_completion(row: Row, plan: Plan) -> Row:
    """A prompt and a completion that are both lists of messages."""
    columns = plan.columns
    prompt, completion = loaded(row[columns["prompt"]]), loaded(row[columns["completion"]])
    for column, value in ((columns["prompt"], prompt), (columns["completion"], completion)):
        if not isinstance(value, list) or not value:
            reason = f"this is {kind_of(value)}, {quoted(value)}, not a list of messages"
            raise RowRefused("wrong_type", reason, "write prompt and completion the same way", field=column)
    assert isinstance(prompt, list)
    assert isinstance(completion, list)
    where = f"{columns['prompt']}+{columns['completion']}"
    messages = canonical_messages(prompt + completion, where, plan.notes)
    return _with_tools({"messages": with_assistant(messages, where, plan.notes)}, row, plan)


def _alpaca(row: Row, plan: Plan) -> Row:
    instruction = plan.text(row, "instruction")
    extra = _optional_text(row, plan, "input")
    system = _optional_text(row, plan, "system")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction})
    messages.append({"role": "assistant", "content": plan.text(row, "output")})
    return {"messages": messages}


def _optional_text(row: Row, plan: Plan, part: str) -> str:
    column = plan.columns.get(part)
    value = row.get(column) if column else None
    return "" if value is None or column is None else text_of(value, column, may_be_empty=True)


def _preference(row: Row, plan: Plan) -> Row:
    return preferences.canonical(row, plan.columns, plan.notes)


def _prompts(row: Row, plan: Plan) -> Row:
    column = plan.columns["prompt"]
    value = loaded(row[column])
    if isinstance(value, list):
        messages: list[Message] = canonical_messages(value, column, plan.notes)
    else:
        messages = [{"role": "user", "content": text_of(row[column], column)}]
    reference = row[plan.columns["reference"]]
    if isinstance(reference, int | float):
        reference = str(reference)
    return {"messages": messages, "reference": text_of(reference, plan.columns["reference"])}


def _text(row: Row, plan: Plan) -> Row:
    return {"text": plan.text(row, "text")}


_ANSWERS: Final = ("answer", "reference", "solution", "ground_truth", "reference_answer", "expected_answer")
_PAIR: Final = {"prompt": ("prompt",), "completion": ("completion", "response"), "tools": ("tools",)}
FORMATS: Final[dict[str, Format]] = {
    "preference": Format(
        kind="preference",
        parts={"prompt": ("prompt", "question"), "chosen": ("chosen",), "rejected": ("rejected",)},
        required=("chosen", "rejected"),
        make=_preference,
    ),
    "messages": Format(
        kind="chat",
        parts={"messages": ("messages",), "tools": ("tools",)},
        required=("messages",),
        make=_messages,
    ),
    "sharegpt": Format(
        kind="chat",
        parts={
            "conversations": ("conversations", "conversation"),
            "system": ("system",),
            "tools": ("tools",),
        },
        required=("conversations",),
        make=_sharegpt,
    ),
    "chat_completion": Format(
        kind="chat", parts=_PAIR, required=("prompt", "completion"), make=_chat_completion
    ),
    "completion": Format(kind="completion", parts=_PAIR, required=("prompt", "completion"), make=_completion),
    "alpaca": Format(
        kind="chat",
        parts={
            "instruction": ("instruction",),
            "input": ("input", "context"),
            "output": ("output", "response"),
            "system": ("system",),
        },
        required=("instruction", "output"),
        make=_alpaca,
    ),
    "prompts": Format(
        kind="prompts",
        parts={"prompt": ("prompt", "question", "problem"), "reference": _ANSWERS},
        required=("prompt", "reference"),
        make=_prompts,
    ),
    "text": Format(kind="text", parts={"text": ("text",)}, required=("text",), make=_text),
}
KNOWN_COLUMNS: Final = frozenset(
    name for one in FORMATS.values() for names in one.parts.values() for name in names
)
PARTS: Final = tuple(dict.fromkeys(part for one in FORMATS.values() for part in one.parts))


def format_of(row: Row) -> Plan | None:
    """Return how a row is laid out by the names of its columns, None if it is unknown."""
    for name, one in FORMATS.items():
        columns = columns_of(name, list(row))
        if all(part in columns for part in one.required) and _fits(name, row, columns):
            return Plan(format=name, columns=columns)
    return None


def columns_of(format: str, names: Sequence[str]) -> dict[str, str]:
    """Return which column is taken for each part of a format, whatever the case of its name."""
    by_name = {name.lower(): name for name in reversed(names)}
    columns = {}
    for part, aliases in FORMATS[format].parts.items():
        if found := next((by_name[alias] for alias in aliases if alias in by_name), None):
            columns[part] = found
    return columns


def _fits(name: str, row: Row, columns: Mapping[str, str]) -> bool:
    """Tell the two ways to write prompt and completion apart by their values."""
    if name != "chat_completion":
        return True
    return any(isinstance(loaded(row[columns[part]]), list) for part in ("prompt", "completion"))


def choose(rows: Iterable[object]) -> Plan | None:
    """Return the plan for a file by its first rows: the format most of those known have."""
    plans: dict[str, dict[str, str]] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, dict) and (plan := format_of(row)):
            counts[plan.format] += 1
            # Optional columns (tools, input) need not be in the first row.
            plans[plan.format] = {**plan.columns, **plans.get(plan.format, {})}
    if not counts:
        return None
    name = counts.most_common(1)[0][0]
    return Plan(format=name, columns=plans[name])


def by_mapping(mapping: Mapping[str, str], columns: Sequence[str], rows: Iterable[object]) -> Plan:
    """Return the plan that a person's mapping of parts to columns describes.

    Raises:
        FileRefused: a part or a column does not exist, or the parts make no format.
    """
    for part, column in mapping.items():
        if part not in PARTS:
            reason = f"{quoted(part)} is not a part that can be mapped"
            raise FileRefused(_unmapped(reason, f"use {', '.join(PARTS)}", part))
        if column not in columns:
            reason = f"the file has no column {quoted(column)}"
            raise FileRefused(_unmapped(reason, f"use one of {', '.join(columns[:30])}", part))
    first = next((row for row in rows if isinstance(row, dict)), {})
    for name, one in FORMATS.items():
        is_whole = all(part in mapping for part in one.required) and all(
            part in one.parts for part in mapping
        )
        if is_whole and _fits(name, {**dict.fromkeys(mapping.values()), **first}, mapping):
            return Plan(format=name, columns=dict(mapping))
    reason = f"{', '.join(mapping)} together make no known format"
    whole = "; ".join(dict.fromkeys(" + ".join(one.required) for one in FORMATS.values()))
    raise FileRefused(_unmapped(reason, f"map one of these sets: {whole}", ""))


def _unmapped(reason: str, fix: str, part: str) -> Problem:
    return Problem(code="bad_mapping", reason=reason, fix=fix, field=f"mapping.{part}" if part else "mapping")
