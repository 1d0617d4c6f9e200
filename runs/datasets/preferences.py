"""Preference pairs in their usual shapes: texts, answers as messages, or two whole conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runs.datasets.chats import Message, Notes, canonical_messages, kind_of, loaded
from runs.datasets.problems import RowRefused, quoted


def canonical(row: Mapping[str, Any], columns: Mapping[str, str], notes: Notes) -> dict[str, Any]:
    """Return messages, chosen and rejected.

    Raises:
        RowRefused: there is no prompt, an answer is missing or of another shape, or both are the same.
    """
    prompt = _prompt(row, columns.get("prompt"), notes)
    shared, chosen = _answer(row, columns["chosen"], notes)
    other, rejected = _answer(row, columns["rejected"], notes)
    if shared != other:
        reason = "the two conversations differ before their last message"
        raise RowRefused(
            "different_prompts", reason, "pair two answers to the same prompt", field=columns["rejected"]
        )
    # A conversation given as an answer usually repeats the prompt.
    messages = shared if shared[: len(prompt)] == prompt else prompt + shared
    if not messages:
        fix = "add a column prompt, or write chosen and rejected as lists of messages that start with it"
        raise RowRefused("missing_column", "there is no prompt", fix, field="prompt")
    if chosen == rejected:
        reason = "chosen and rejected are the same text"
        raise RowRefused("same_answers", reason, "leave this row out", field=columns["rejected"])
    return {"messages": messages, "chosen": chosen, "rejected": rejected}


def _prompt(row: Mapping[str, Any], column: str | None, notes: Notes) -> list[Message]:
    value = loaded(row.get(column)) if column else None
    if value is None or column is None:
        return []
    if isinstance(value, list):
        return canonical_messages(value, column, notes)
    if not isinstance(value, str) or not value.strip():
        reason = f"the prompt is {kind_of(value)}, {quoted(value)}"
        raise RowRefused("wrong_type", reason, "write a text or a list of messages", field=column)
    return [{"role": "user", "content": value}]


def _answer(row: Mapping[str, Any], column: str, notes: Notes) -> tuple[list[Message], str]:
    """Return the messages before the answer, if they are given with it, and the answer."""
    value = loaded(row[column])
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str) and value.strip():
        return [], value
    if not isinstance(value, list) or not value:
        reason = f"the answer is {kind_of(value)}, {quoted(value)}"
        raise RowRefused("wrong_type", reason, "write a text or a list of messages", field=column)
    if len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "assistant":
        # An answer alone; it is checked as if a user had asked.
        messages = canonical_messages([{"role": "user", "content": "?"}, *value], column, notes)[1:]
    else:
        messages = canonical_messages(value, column, notes)
    if messages[-1]["role"] != "assistant":
        reason = "the last message is not the assistant's"
        raise RowRefused("no_assistant", reason, "end with the answer of the assistant", field=column)
    return messages[:-1], messages[-1]["content"]
