"""Tokens that remember which characters they came from, and which of them are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from runs.recipes.chat_templates import Span

# How byte-level and sentencepiece tokenizers write a token's leading space.
_SPACES: Final = "\u0120\u2581 "


@dataclass(kw_only=True, eq=False)
class Encoded:
    """A text's tokens.

    Shapes:
        tokens, starts, ends: (tokens,); a token stands for the characters from its start to its end, and
            parts of one character share it. Tokens of no character have the place they stand at.
        mask: bool, (tokens,), whether the token is trained on.
        is_added: bool, (tokens,), whether the token stands for no character of the text.
    """

    text: str
    tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    is_added: npt.NDArray[np.bool_]

    def train(self, spans: Sequence[Span], *, is_all: bool) -> None:
        """Mark the tokens that begin inside the spans, or all."""
        self.mask[:] = is_all
        for start, end in spans:
            first, after = np.searchsorted(self.starts, (start, end))
            self.mask[first:after] = True

    def straddles(self, place: int) -> bool:
        """Say whether a token reaches over a place in the text."""
        first = int(np.searchsorted(self.starts, place))
        return first > 0 and int(self.ends[first - 1]) > place

    def followed_by(self, other: Encoded) -> Encoded:
        """Return this text and its tokens with another's after it."""
        shift = len(self.text)
        return Encoded(
            text=self.text + other.text,
            tokens=np.concatenate([self.tokens, other.tokens]),
            starts=np.concatenate([self.starts, other.starts + shift]),
            ends=np.concatenate([self.ends, other.ends + shift]),
            mask=np.concatenate([self.mask, other.mask]),
            is_added=np.concatenate([self.is_added, other.is_added]),
        )

    def between(self, prefix: Sequence[int], suffix: Sequence[int]) -> Encoded:
        """Return the text with tokens before it, and after it tokens that are trained on; the first never is."""
        whole = self
        if prefix or suffix:
            whole = _added(prefix, is_trained=False).followed_by(self)
            whole = whole.followed_by(_added(suffix, is_trained=True))
        whole.mask[:1] = False  # nothing predicts the first token
        return whole

    def text_of(self, start: int, end: int, tokenizer: Any) -> str:
        """Return the text of the tokens from `start` to before `end`; neighbours share no character and lose none."""
        own = self.text[self._begin(start) : self._begin(end)]
        is_added = self.is_added[start:end]
        if not is_added.any():
            return own
        names = [str(tokenizer.id_to_token(int(token))) for token in self.tokens[start:end][is_added]]
        num_before = int(np.argmin(is_added)) if not is_added.all() else 0
        return "".join(names[:num_before]) + own + "".join(names[num_before:])

    def _begin(self, place: int) -> int:
        """Return where the text of a token begins, with blanks before it that no token claims."""
        if place == 0:
            return 0
        if place == len(self.tokens):
            return len(self.text)
        return min(int(self.starts[place]), int(self.ends[place - 1]))


def encoded(text: str, encoding: Any) -> Encoded:
    """Return a tokenizer's encoding of a text, made without added tokens."""
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = offsets[:, 0].copy(), offsets[:, 1].copy()
    _take_spaces(text, encoding, starts, ends)
    num_tokens = len(starts)
    return Encoded(
        text=text,
        tokens=np.array(encoding.ids, dtype=np.int32),
        starts=starts,
        ends=ends,
        mask=np.zeros(num_tokens, dtype=np.bool_),
        is_added=np.zeros(num_tokens, dtype=np.bool_),
    )


def _take_spaces(
    text: str, encoding: Any, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> None:
    """Let tokens begin with their leading spaces, which some tokenizers leave out of the offsets they tell."""
    gaps = np.flatnonzero(starts[1:] > ends[:-1]) + 1
    if len(starts) and starts[0] > 0:
        gaps = np.concatenate([[0], gaps])
    if not len(gaps):
        return
    names = encoding.tokens
    for place in gaps.tolist():
        start = int(starts[place])
        low = int(ends[place - 1]) if place else 0
        num_spaces = len(names[place]) - len(names[place].lstrip(_SPACES))
        starts[place] = max(low, start - num_spaces)


def _added(tokens: Sequence[int], *, is_trained: bool) -> Encoded:
    num_tokens = len(tokens)
    return Encoded(
        text="",
        tokens=np.array(tokens, dtype=np.int32),
        starts=np.zeros(num_tokens, dtype=np.int64),
        ends=np.zeros(num_tokens, dtype=np.int64),
        mask=np.full(num_tokens, is_trained),
        is_added=np.ones(num_tokens, dtype=np.bool_),
    )
