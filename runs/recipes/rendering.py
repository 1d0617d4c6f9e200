"""Rows as a base model reads them: rendered, tokenised, and marked with what is trained on.

Training, the preview of a row and prompts for samples all go through here, so that they agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from runs.exceptions import BaseModelAway, RequestInvalid
from runs.recipes import tokenizer_files
from runs.recipes.chat_templates import ChatTemplate, Message, Span
from runs.recipes.encodings import Encoded, encoded
from runs.recipes.tokenizer_files import TokenizerFiles
from runs.recipes.turns import Conversation
from runs.services import base_models

TrainOn = Literal["assistant", "last", "all"]
Row = Mapping[str, Any]

ROLES: Final = ("system", "user", "assistant", "tool")
_KEPT_MODELS: Final = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRow:
    """One row as tokens.

    Shapes:
        tokens: int32, (tokens,), at most max_length of them.
        mask: bool, (tokens,), whether the model is trained to predict this token; never the first.
    """

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    num_truncated: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring tokens that are treated alike, as text."""

    text: str
    is_trained: bool
    is_truncated: bool
    is_special: bool


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A row as text, before it is tokens; `spans` are the characters that are trained on.

    `prefix` and `suffix` are tokens that stand before and after the text's own; the suffix is trained on.
    """

    text: str
    spans: tuple[Span, ...]
    is_all_trained: bool
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    # Where a prompt ends that is encoded alone when it is answered.
    joint: int | None = None


class Renderer:
    """Turns rows into tokens for one base model. Safe to share between threads."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._files = files
        self._tokenizer = files.tokenizer
        self._ends = tuple(files.ends.values())
        self._specials = tuple({*files.specials.values(), *self._ends})
        self.digest = files.digest
        self.stop_tokens = tuple(sorted(files.ends))

    def row(self, row: Row, *, train_on: TrainOn, max_length: int) -> TokenRow:
        """Return a row as tokens, cut at the end to `max_length`.

        Raises:
            RequestInvalid: the row is of no trainable kind, or the chat template cannot write it.
        """
        return _cut(self._encoded(self._text(row, train_on)), max_length)

    def rows(
        self, rows: Iterable[Row], *, train_on: TrainOn, max_length: int
    ) -> list[TokenRow | RequestInvalid]:
        """Return many rows as tokens, encoded together; in place of a row that cannot be rendered, its error."""
        texts = [self._text_or_error(row, train_on) for row in rows]
        good = [text for text in texts if isinstance(text, _Text)]
        encodings = self._tokenizer.encode_batch([text.text for text in good], add_special_tokens=False)
        made = (
            _cut(self._assembled(text, encoding), max_length)
            for text, encoding in zip(good, encodings, strict=True)
        )
        return [next(made) if isinstance(text, _Text) else text for text in texts]

    def pieces(self, row: Row, *, train_on: TrainOn, max_length: int) -> list[Piece]:
        """Return a whole row as text, in pieces by what becomes of their tokens.

        Raises:
            RequestInvalid: the row is of no trainable kind, or the chat template cannot write it.
        """
        whole = self._encoded(self._text(row, train_on))
        is_special = np.isin(whole.tokens, list(self._files.specials))
        kinds = [
            (bool(trained) and place < max_length, place >= max_length, bool(special))
            for place, (trained, special) in enumerate(zip(whole.mask, is_special, strict=True))
        ]
        pieces: list[Piece] = []
        start = 0
        for kind, group in groupby(kinds):
            end = start + len(list(group))
            text = whole.text_of(start, end, self._tokenizer)
            if text:
                is_trained, is_truncated, special = kind
                pieces.append(
                    Piece(text=text, is_trained=is_trained, is_truncated=is_truncated, is_special=special)
                )
            start = end
        return pieces

    def prompt(self, text_or_messages: str | Sequence[Message], *, as_chat: bool = True) -> list[int]:
        """Return the tokens of a prompt that the model is to answer.

        Args:
            text_or_messages: a conversation so far; a text alone is what the user says.
            as_chat: False for a text that the model is to go on with, as it is trained on completions.
        Raises:
            RequestInvalid: the chat template refuses the messages.
        """
        if isinstance(text_or_messages, str) and not as_chat:
            return [*self._files.prefix, *self._ids(text_or_messages)]
        messages: Sequence[Message] = (
            [{"role": "user", "content": text_or_messages}]
            if isinstance(text_or_messages, str)
            else _checked_messages(text_or_messages)
        )
        template = self._files.template
        template.check(messages, None)
        return self._ids(template.render(messages, None, add_generation_prompt=True))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text, special ones by their names."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def answer(self, tokens: Sequence[int]) -> str:
        """Return sampled tokens as text, without the token that ended them."""
        is_ended = bool(tokens) and tokens[-1] in self.stop_tokens
        return self.decode(tokens[:-1] if is_ended else tokens)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    # -- rows as text ------------------------------------------------------------------------------------

    def _text_or_error(self, row: Row, train_on: TrainOn) -> _Text | RequestInvalid:
        try:
            return self._text(row, train_on)
        except RequestInvalid as error:
            return error

    def _text(self, row: Row, train_on: TrainOn) -> _Text:
        if "chosen" in row or "reference" in row:
            raise RequestInvalid(
                "this row holds a preference or a prompt without an answer; "
                "supervised training takes messages, prompt and completion, or text"
            )
        if "messages" in row:
            return self._chat(row, train_on)
        if "completion" in row:
            prompt, completion = _string(row, "prompt"), _string(row, "completion")
            return self._plain(prompt, completion, is_all_trained=train_on == "all")
        if "text" in row:
            return self._plain("", _string(row, "text"), is_all_trained=True)
        raise RequestInvalid(
            f"this row has the fields {', '.join(sorted(row))[:200] or 'none'}; "
            "supervised training takes messages, prompt and completion, or text"
        )

    def _plain(self, prompt: str, answer: str, *, is_all_trained: bool) -> _Text:
        text = prompt + answer
        return _Text(
            text=text,
            spans=((len(prompt), len(text)),),
            is_all_trained=is_all_trained,
            prefix=self._files.prefix,
            suffix=self._files.eos,
            joint=len(prompt) if prompt else None,
        )

    def _chat(self, row: Row, train_on: TrainOn) -> _Text:
        messages, tools = _checked_messages(row["messages"]), row.get("tools") or None
        template = self._template(tools)
        template.check(messages, tools)
        conversation = Conversation(
            template=template, messages=messages, tools=tools, specials=self._specials, ends=self._ends
        )
        unlearned = _unlearned(row["messages"])
        if train_on == "all" and not unlearned:
            return _Text(text=conversation.text(), spans=(), is_all_trained=True)
        text, spans = _spans(conversation, train_on, unlearned)
        if train_on == "all":
            return _Text(text=text, spans=tuple(spans), is_all_trained=False)
        suffix = self._files.eos if conversation.is_open(text, spans) else ()
        return _Text(text=text, spans=tuple(spans), is_all_trained=False, suffix=suffix)

    def _template(self, tools: object) -> ChatTemplate:
        return self._files.tool_template if tools else self._files.template

    # -- text as tokens ----------------------------------------------------------------------------------

    def _encoded(self, text: _Text) -> Encoded:
        return self._assembled(text, self._tokenizer.encode(text.text, add_special_tokens=False))

    def _assembled(self, text: _Text, encoding: Any) -> Encoded:
        body = encoded(text.text, encoding)
        if text.joint is not None and not self._files.adds_space and body.straddles(text.joint):
            body = self._apart(text.text, text.joint)
        body.train(text.spans, is_all=text.is_all_trained)
        return body.between(text.prefix, text.suffix)

    def _apart(self, text: str, joint: int) -> Encoded:
        """Encode a prompt and its completion each alone, as when the prompt is answered.

        Where a token reaches over the joint, the model would else be trained on prompts that it never meets,
        and the completion's first word would be no part of the training.
        """
        first, second = (
            encoded(part, self._tokenizer.encode(part, add_special_tokens=False))
            for part in (text[:joint], text[joint:])
        )
        return first.followed_by(second)


def renderer_of(base_model: str) -> Renderer:
    """Return the renderer of a configured base model, loaded or not.

    Raises:
        BaseModelAway: it is not configured, or its files are not on this machine.
        RequestInvalid: they cannot be read.
    """
    info = base_models.find(base_model)
    if info is None:
        names = ", ".join(one.name for one in base_models.available())
        raise BaseModelAway(
            f"unknown base model {base_model[:80]!r}; this server offers {names}", place="base_model"
        )
    folder = info.folder
    if folder is None or not any(folder.iterdir()):  # an empty one is where a disk is not mounted
        raise BaseModelAway(
            f"the files of base model {base_model} are not on this machine yet; "
            "start a worker that loads it, or name its folder in MINTWEB_BASE_MODELS",
            place="base_model",
        )
    return _renderer(base_model, folder, _stamp(folder))


def decoder_of(base_model: str) -> Callable[[Sequence[int]], str]:
    """Return what turns sampled tokens into text, without the token that ended them.

    Where the base model is not on offer any more its tokens are returned as numbers.
    """
    try:
        return renderer_of(base_model).answer
    except RequestInvalid:
        return lambda tokens: " ".join(map(str, tokens))


@lru_cache(maxsize=_KEPT_MODELS)
def _renderer(model: str, folder: Path, stamp: tuple[int, ...]) -> Renderer:
    return Renderer(tokenizer_files.read(model, folder))


def _stamp(folder: Path) -> tuple[int, ...]:
    """Return what changes when someone replaces a file of the model."""
    files = [folder / name for name in tokenizer_files.FILES]
    return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)


def _cut(whole: Encoded, max_length: int) -> TokenRow:
    return TokenRow(
        tokens=whole.tokens[:max_length],
        mask=whole.mask[:max_length],
        num_truncated=max(0, len(whole.tokens) - max_length),
    )


def _string(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise RequestInvalid(f"{name} must be text, not {type(value).__name__}")
    return value


def _unlearned(messages: Sequence[Message]) -> frozenset[int]:
    """Return the numbers of the answers that are not to be learned, counted among the answers alone."""
    answers = [message for message in messages if message["role"] == "assistant"]
    return frozenset(number for number, answer in enumerate(answers) if answer.get("weight") == 0)


def _spans(
    conversation: Conversation, train_on: TrainOn, unlearned: frozenset[int]
) -> tuple[str, list[Span]]:
    """Return the text of a conversation and what of it is trained on, without the answers that are not learned.

    Raises:
        RequestInvalid: the template does not show where those answers are.
    """
    num_answers = sum(message["role"] == "assistant" for message in conversation.messages)
    if train_on == "last" and num_answers - 1 in unlearned:
        return conversation.text(), []
    if train_on == "last" or not unlearned:
        return conversation.turns(only_last=train_on == "last")
    text, turns = conversation.turns(only_last=False)
    if len(turns) != num_answers:
        raise RequestInvalid(
            f"the chat template of {conversation.template.model} does not mark each answer once, so that those of "
            "weight 0 cannot be told from the others; leave the weights out, or this row"
        )
    if train_on == "all":
        return text, _between([turns[number] for number in sorted(unlearned)], len(text))
    return text, [turn for number, turn in enumerate(turns) if number not in unlearned]


def _between(spans: Sequence[Span], end: int) -> list[Span]:
    """Return what lies before, between and after some places in a text."""
    edges = [0, *(edge for span in spans for edge in span), end]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    """Return the messages as templates want them: content always text, arguments of calls as objects."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestInvalid("messages must be a list with at least one message")
    checked = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise RequestInvalid(f"message {number} has the role {role!r}; allowed are {', '.join(ROLES)}")
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise RequestInvalid(
                f"the content of message {number} must be text, not {type(content).__name__}"
            )
        one = {**message, "content": content}
        one.pop("weight", None)  # no word of any template
        if message.get("tool_calls"):
            one["tool_calls"] = [_call(call) for call in message["tool_calls"]]
        checked.append(one)
    return checked


def _call(call: Any) -> Any:
    """Return a tool call whose arguments are an object; templates would write a text of JSON quoted once more."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
