"""What changed between two texts, word by word. Knows no rows and no markup."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Final, Literal

Mark = Literal["same", "new", "gone"]
# Beyond this the comparison, which is quadratic, would take longer than the page should.
_MAX_PAIRS: Final = 250_000
_WORDS: Final = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Change:
    """A stretch of text that both texts have, or only the new one, or only the old one."""

    text: str
    mark: Mark


@lru_cache(maxsize=4096)
def changes(old: str, new: str) -> tuple[Change, ...]:
    """Return the stretches that lead from one text to the other, in reading order."""
    before, after = _WORDS.findall(old), _WORDS.findall(new)
    start = _num_common(before, after)
    end = _num_common(before[start:][::-1], after[start:][::-1])
    middle_before, middle_after = before[start : len(before) - end], after[start : len(after) - end]
    parts = [
        ("same", after[:start]),
        *_middle(middle_before, middle_after),
        ("same", after[len(after) - end :]),
    ]
    return tuple(_joined(parts))


def _middle(before: Sequence[str], after: Sequence[str]) -> Iterator[tuple[Mark, Sequence[str]]]:
    if len(before) * len(after) > _MAX_PAIRS:
        yield "gone", before
        yield "new", after
        return
    gone: list[str] = []
    new: list[str] = []
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    for kind, old_from, old_to, new_from, new_to in matcher.get_opcodes():
        is_gap = "".join(after[new_from:new_to]).isspace()
        # A space alone between two changes is no common text: it belongs to both.
        if kind != "equal" or (is_gap and (gone or new)):
            gone += before[old_from:old_to]
            new += after[new_from:new_to]
            continue
        yield "gone", gone
        yield "new", new
        gone, new = [], []
        yield "same", after[new_from:new_to]
    yield "gone", gone
    yield "new", new


def _num_common(first: Sequence[str], second: Sequence[str]) -> int:
    number = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        number += 1
    return number


def _joined(parts: Sequence[tuple[Mark, Sequence[str]]]) -> Iterator[Change]:
    """Yield the parts that hold text, neighbours of one kind as one."""
    text, current = "", None
    for mark, words in parts:
        piece = "".join(words)
        if not piece:
            continue
        if current is not None and mark != current:
            yield Change(text, current)
            text = ""
        text, current = text + piece, mark
    if current is not None:
        yield Change(text, current)
