"""Guesses which column holds what in a file whose columns are not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from runs.datasets.chats import loaded

_PROMPTS: Final = (
    "prompt", "question", "query", "instruction", "input", "source", "user", "request", "task", "frage",
    "eingabe", "aufgabe", "anweisung", "pregunta", "entrada", "domanda", "pergunta", "demande", "вопрос", "问题",
    "問題", "指令", "提问", "質問", "질문", "q", "x",
)  # fmt: skip
_COMPLETIONS: Final = (
    "completion", "answer", "response", "output", "reply", "target", "assistant", "label", "result", "summary",
    "antwort", "ausgabe", "respuesta", "salida", "risposta", "resposta", "réponse", "reponse", "ответ", "回答",
    "答案", "答え", "대답", "답변", "a", "y",
)  # fmt: skip
_TEXTS: Final = (
    "text",
    "content",
    "body",
    "article",
    "document",
    "inhalt",
    "texto",
    "testo",
    "texte",
    "текст",
    "文本",
)
_CUT: Final = 200


def suggest(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return a mapping to start from, {} if nothing looks like a text."""
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    for column in columns:
        if format := _conversation(column, rows):
            return {format: column}
    texts = [column for column in columns if any(isinstance(row.get(column), str) for row in rows)]
    prompt = _named(texts, _PROMPTS)
    completion = _named([one for one in texts if one != prompt], _COMPLETIONS)
    if prompt and completion:
        return {"prompt": prompt, "completion": completion}
    if text := _named(texts, _TEXTS) if not (prompt or completion) else "":
        return {"text": text}
    return _by_length(texts, rows, prompt, completion)


def sample_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return up to three rows as short texts."""
    return [{str(name)[:_CUT]: str(value)[:_CUT] for name, value in row.items()} for row in rows[:3]]


def _conversation(column: str, rows: Sequence[Mapping[str, Any]]) -> str:
    for row in rows:
        value = loaded(row.get(column))
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if "role" in value[0]:
                return "messages"
            if "from" in value[0]:
                return "conversations"
    return ""


def _named(columns: Sequence[str], names: Sequence[str]) -> str:
    """Return the column with the likeliest name: the same, else one that holds a name of four letters or more."""
    lowered = {column.strip().lower(): column for column in reversed(columns)}
    for name in names:
        if name in lowered:
            return lowered[name]
    for name in names:
        if len(name) >= 4 or not name.isascii():
            for low, column in lowered.items():
                if name in low:
                    return column
    return ""


def _by_length(
    texts: Sequence[str], rows: Sequence[Mapping[str, Any]], prompt: str, completion: str
) -> dict[str, str]:
    """Return the two longest columns, the first of them as the prompt; or a single one as the text."""
    lengths = {one: sum(len(str(row.get(one) or "")) for row in rows) for one in texts}
    longest = sorted(texts, key=lambda one: -lengths[one])
    if len(longest) < 2:
        return {"text": longest[0]} if longest else {}
    others = [one for one in longest if one not in (prompt, completion)]
    if prompt:
        return {"prompt": prompt, "completion": others[0]}
    if completion:
        return {"prompt": others[0], "completion": completion}
    first, second = sorted(longest[:2], key=texts.index)
    return {"prompt": first, "completion": second}
