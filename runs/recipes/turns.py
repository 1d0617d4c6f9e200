"""Where in a rendered conversation the assistant's turns are: what the model must learn to write.

A turn is found by the template's generation blocks, else by rendering the conversation up to it. Templates
that write earlier turns in another way once more follow (without their thinking, say) are handled by putting
a mark in place of a turn's content and looking at what changes. What none of this explains is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from runs.exceptions import RequestInvalid
from runs.recipes.chat_templates import MARK, ChatTemplate, Message, Span

# A prompt may open the model's thinking, or skip it, which the rendered answer need not do.
_OPENED_THINKING: Final = re.compile(r"<[^<>\s/]+>\s*(</[^<>\s]+>\s*)?$")
# A template may drop the thinking of an answer; what follows its closing tag must still be there.
_LAST_WORDS: Final = re.compile(r"[>\n]")
_TAIL_CHARS: Final = 20
_WORDS: Final = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One row's messages and the template that writes them.

    Args:
        specials: all special tokens; white space that a template writes after one ends no turn.
        ends: the tokens that can end a turn.
    """

    template: ChatTemplate
    messages: Sequence[Message]
    tools: Sequence[Any] | None
    specials: tuple[str, ...]
    ends: tuple[str, ...]

    def text(self) -> str:
        """Return the whole conversation as text."""
        return self.template.render(self.messages, self.tools)

    def turns(self, *, only_last: bool) -> tuple[str, list[Span]]:
        """Return the text and where in it the assistant's turns are, each with the token that ends it.

        Raises:
            RequestInvalid: the template refuses the messages, or a turn cannot be told from the rest.
        """
        numbers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if self.template.has_generation:
            text, spans = self.template.render_marked(self.messages, self.tools)
            if spans or not numbers:
                return text, self._generated(text, spans, numbers, only_last=only_last)
        text = self.text()
        return text, [self._turn(text, number) for number in (numbers[-1:] if only_last else numbers)]

    def _generated(self, text: str, spans: list[Span], numbers: list[int], *, only_last: bool) -> list[Span]:
        if only_last and numbers and len(spans) == len(numbers):
            spans = spans[-1:]
        elif only_last and numbers:  # a turn of several blocks
            start = self._start(text, numbers[-1])
            spans = [span for span in spans if span[0] >= start]
        return [(start, self._with_end(text, end)) for start, end in spans]

    def is_open(self, text: str, spans: Sequence[Span]) -> bool:
        """Say whether the text ends with an answer and no token that ends it: the model would not learn to stop."""
        is_last = bool(spans) and spans[-1][1] == len(text)
        return is_last and not text.rstrip().endswith(self.specials)

    def _with_end(self, text: str, end: int) -> int:
        """Take in the token that ends the turn where it was left out: the model must learn to stop."""
        if text[:end].rstrip().endswith(self.ends):
            return end
        return next((end + len(token) for token in self.ends if text.startswith(token, end)), end)

    def _turn(self, text: str, number: int) -> Span:
        start, end = self._start(text, number), self._end(text, number)
        if start > end:
            raise self._unclear(number)
        words = _WORDS.findall(str(self.messages[number].get("content") or ""))
        written = text[start:end].rstrip()
        if words and words[-1] not in written:
            raise self._unclear(number)
        return start, start + len(written) if written.endswith(self.specials) else self._with_end(text, end)

    def _start(self, text: str, number: int) -> int:
        """Return where the model goes on after the prompt for this turn."""
        prompt = self._prompt(number)
        if text.startswith(prompt):
            return len(prompt)
        # Between the content before and the content of this turn stands its header, as at the prompt's end.
        low = self._content(text, number - 1)[1] if number else 0
        header = text[low : self._content(text, number)[0]]
        without_thinking = _OPENED_THINKING.sub("", prompt)
        for candidate in (prompt, prompt.rstrip(), without_thinking, without_thinking.rstrip()):
            length = _overlap(candidate, header)
            inserted = header[length:]
            if header[:length].strip() and not any(token in inserted for token in self.specials):
                return low + length
        raise self._unclear(number)

    def _prompt(self, number: int) -> str:
        try:
            return self.template.render(self.messages[:number], self.tools, add_generation_prompt=True)
        except RequestInvalid as error:
            if number:
                raise
            raise RequestInvalid(
                f"{error.message}; the conversation begins with the assistant: put a user message before it"
            ) from error

    def _end(self, text: str, number: int) -> int:
        """Return where what follows this turn begins."""
        if number == len(self.messages) - 1:
            return len(text)
        until = replace(self, messages=self.messages[: number + 1])
        text_until = until.text()
        if text.startswith(text_until):
            return len(text_until)
        end = self._content(text, number)[1]
        closing = text_until[until._content(text_until, number)[1] :]
        if text.startswith(closing, end):
            return end + len(closing)
        rest = text[end:].lstrip()
        for token in self.ends:
            if rest.startswith(token):
                return len(text) - len(rest) + len(token)
        raise self._unclear(number)

    def _content(self, text: str, number: int) -> Span:
        """Return where the text changes with a message's content."""
        messages = list(self.messages)
        messages[number] = {**messages[number], "content": MARK}
        marked = replace(self, messages=messages).text()
        if marked.count(MARK) != 1:
            raise self._unclear(number)
        start = _common_prefix(text, marked)
        end = len(text) - _common_prefix(text[start:][::-1], marked[start:][::-1])
        content = str(self.messages[number].get("content") or "").strip()
        if not text[start:end].rstrip().endswith(_LAST_WORDS.split(content)[-1][-_TAIL_CHARS:]):
            raise self._unclear(number)
        return start, end

    def _unclear(self, number: int) -> RequestInvalid:
        return RequestInvalid(
            f"the chat template of {self.template.model} rewrites earlier turns, so that message {number + 1} cannot "
            "be told from the rest; train on 'last', or split the conversation after each assistant message"
        )


def _common_prefix(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their start, by halving."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _overlap(text: str, header: str) -> int:
    """Return how much of the header's start the text ends with."""
    return next((n for n in range(min(len(text), len(header)), 0, -1) if text.endswith(header[:n])), 0)
