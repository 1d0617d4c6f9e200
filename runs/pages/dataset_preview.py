"""Rows of a dataset as a base model reads them: what is trained on, what is not, and where rows are cut."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from runs.exceptions import RequestInvalid
from runs.models import DatasetVersion
from runs.recipes import defaults
from runs.recipes.rendering import Piece, Renderer, TrainOn, renderer_of
from runs.services import base_models
from runs.services.dataset_rows import RowReader, open_rows

PAGE_SIZE: Final = 5
SHORTEST, LONGEST = 8, 1_048_576
TRAIN_ON: Final = (
    ("assistant", "the assistant's messages"),
    ("last", "the last answer only"),
    ("all", "everything"),
)
# Longer rows are shown as they are stored, and only their beginning: a page must not wait for a tokenizer.
_MAX_ROW_BYTES: Final = 400_000
_MAX_SHOWN_CHARS: Final = 12_000


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How the rows are read."""

    base_model: str
    train_on: TrainOn
    max_length: int
    first_row: int


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A stretch of a rendered row; `begins_cut` where the row is cut."""

    text: str
    is_trained: bool
    is_special: bool
    is_cut: bool
    begins_cut: bool


@dataclass(frozen=True, kw_only=True)
class RowView:
    """One row; `raw` is what stands for a row that has no pieces, and `error` says why."""

    number: int
    pieces: list[Shown]
    num_tokens: int
    num_trained: int
    num_cut: int
    num_hidden_chars: int
    raw: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A page of rows.

    Args:
        cut_share: about how many of all the rows are longer than the limit; None if no lengths are known.
        error: why no row can be rendered for this base model.
    """

    choice: Choice
    models: list[str]
    train_on: Sequence[tuple[str, str]]
    shortest: int
    longest: int
    has_answers: bool
    rows: list[RowView]
    num_rows: int
    last_row: int
    previous_row: int
    next_row: int
    cut_share: float | None
    error: str


def preview_of(version: DatasetVersion, query: Mapping[str, str]) -> Preview:
    """Return the rows that the address asks for; what it says wrongly is as if it said nothing."""
    with open_rows(version) as rows:
        choice = _choice(query, num_rows=len(rows))
        renderer, error = _renderer(choice.base_model)
        first, end = choice.first_row - 1, min(choice.first_row - 1 + PAGE_SIZE, len(rows))
        return Preview(
            choice=choice,
            models=[info.name for info in base_models.available()],
            train_on=TRAIN_ON,
            shortest=SHORTEST,
            longest=LONGEST,
            has_answers=version.kind in ("chat", "completion"),
            rows=[_row(rows, number, renderer, choice) for number in range(first, end)],
            num_rows=len(rows),
            last_row=end,
            previous_row=max(1, choice.first_row - PAGE_SIZE) if choice.first_row > 1 else 0,
            next_row=end + 1 if end < len(rows) else 0,
            cut_share=_cut_share(version, choice),
            error=error,
        )


def _choice(query: Mapping[str, str], *, num_rows: int) -> Choice:
    infos = base_models.available()
    chosen = next((info for info in infos if info.name == query.get("base_model")), None)
    info = chosen or next((info for info in infos if info.is_loaded), infos[0])
    asked = query.get("train_on", "")
    train_on: TrainOn = next((one for one in get_args(TrainOn) if one == asked), "assistant")
    return Choice(
        base_model=info.name,
        train_on=train_on,
        max_length=_number(query, "max_length", SHORTEST, LONGEST) or defaults.max_length(info),
        first_row=_number(query, "row", 1, num_rows) or 1,
    )


def _number(query: Mapping[str, str], name: str, lowest: int, highest: int) -> int:
    """Return a whole number of the address brought into its range, 0 if it is none."""
    text = query.get(name, "")
    return min(max(int(text), lowest), highest) if text.isascii() and text.isdigit() and len(text) < 16 else 0


def _cut_share(version: DatasetVersion, choice: Choice) -> float | None:
    """Return the share of rows with more tokens than the limit, by the histogram of the report.

    Within a bin the rows are taken to be spread evenly.
    """
    lengths = version.report.get("tokens", {}).get(choice.base_model)
    if lengths is None:
        return None
    longer = 0.0
    for one in lengths["histogram"]:
        low, high, limit = one["low"], one["high"], choice.max_length
        longer += one["count"] * min(max((high - limit) / (high - low + 1), 0.0), 1.0)
    return longer / lengths["num_rows"] if lengths["max"] > choice.max_length else 0.0


def _renderer(base_model: str) -> tuple[Renderer | None, str]:
    try:
        return renderer_of(base_model), ""
    except RequestInvalid as error:
        return None, error.message


def _row(rows: RowReader, number: int, renderer: Renderer | None, choice: Choice) -> RowView:
    if renderer is None:
        return _raw(rows, number, "")
    if (size_bytes := rows.size_bytes(number)) > _MAX_ROW_BYTES:
        return _raw(rows, number, f"this row has {size_bytes:,} bytes, too many to render here")
    row = rows[number]
    try:
        pieces = renderer.pieces(row, train_on=choice.train_on, max_length=choice.max_length)
        tokens = renderer.row(row, train_on=choice.train_on, max_length=choice.max_length)
    except RequestInvalid as error:
        return _raw(rows, number, error.message)
    shown, num_hidden = _shown(pieces)
    return RowView(
        number=number + 1,
        pieces=shown,
        num_tokens=len(tokens.tokens) + tokens.num_truncated,
        num_trained=int(tokens.mask.sum()),
        num_cut=tokens.num_truncated,
        num_hidden_chars=num_hidden,
        raw="",
        error="",
    )


def _raw(rows: RowReader, number: int, error: str) -> RowView:
    stored = rows.raw(number, limit=_MAX_ROW_BYTES)
    is_whole = len(stored) == rows.size_bytes(number)
    text = stored.decode("utf-8", "replace")
    if is_whole:
        text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    return RowView(
        number=number + 1,
        pieces=[],
        num_tokens=0,
        num_trained=0,
        num_cut=0,
        num_hidden_chars=max(0, (len(text) if is_whole else rows.size_bytes(number)) - _MAX_SHOWN_CHARS),
        raw=text[:_MAX_SHOWN_CHARS],
        error=error,
    )


def _shown(pieces: Sequence[Piece]) -> tuple[list[Shown], int]:
    """Return the beginning of a row, and how many characters more it has."""
    shown: list[Shown] = []
    left = _MAX_SHOWN_CHARS
    is_cut = False
    for piece in pieces:
        if left > 0:
            shown.append(
                Shown(
                    text=piece.text[:left],
                    is_trained=piece.is_trained,
                    is_special=piece.is_special,
                    is_cut=piece.is_truncated,
                    begins_cut=piece.is_truncated and not is_cut,
                )
            )
            is_cut = is_cut or piece.is_truncated
        left -= len(piece.text)
    return shown, max(0, -left)


def query_of(choice: Choice) -> dict[str, Any]:
    """Return the choice as the address says it, without the row."""
    return {
        "base_model": choice.base_model,
        "train_on": choice.train_on,
        "max_length": choice.max_length,
    }
