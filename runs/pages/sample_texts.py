"""Sampled tokens as text, with the base model's own tokenizer. Knows no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from typing import Any, Final

from pydantic import ValidationError
from tokenizers import Tokenizer

from runs.models import Operation
from runs.schemas.requests import from_canonical
from runs.schemas.results import decode_sample
from runs.schemas.sampling import Sample
from runs.services import base_models, operations

logger = logging.getLogger(__name__)

MAX_PROMPT_TOKENS: Final = 300
MAX_TOKENS: Final = 800
MAX_SEQUENCES: Final = 4


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of text; special tokens, such as the end of a turn, are set apart."""

    text: str
    is_special: bool


@dataclass(frozen=True, kw_only=True)
class Text:
    """Decoded tokens; `num_hidden` more are not shown."""

    pieces: list[Piece]
    num_tokens: int
    num_hidden: int


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """One generated continuation."""

    text: Text
    stop_reason: str


@dataclass(frozen=True, kw_only=True)
class SampleText:
    """A prompt with what was generated for it."""

    created_at: datetime
    made_by: str
    step: int | None
    temperature: float
    prompt: Text
    sequences: list[Continuation]
    num_hidden: int


def texts_of(samples: Iterable[Operation], *, base_model: str) -> list[SampleText]:
    """Return the samples that generated text; those that only asked for log-probabilities are left out."""
    tokenizer = _tokenizer_of(base_model)
    texts = (_text_of(sample, tokenizer) for sample in samples)
    return [text for text in texts if text is not None]


def _text_of(row: Operation, tokenizer: Any) -> SampleText | None:
    if row.result is None or not row.result_is_proto:
        return None
    try:
        request = from_canonical(Sample, operations.payload_of(row.payload, row.payload_file))
    except (ValidationError, OSError) as error:
        logger.warning("sample %s cannot be shown: %s", row.pk, error)
        return None
    if request.prompt_logprobs and request.sampling_params.max_tokens == 1:
        return None
    output = decode_sample(bytes(row.result))
    prompt = request.prompt.array(place="prompt").tolist()
    checkpoint = row.sampling_session.checkpoint if row.sampling_session else None
    return SampleText(
        created_at=row.created_at,
        made_by=checkpoint.name if checkpoint and not checkpoint.is_ephemeral else "current weights",
        step=checkpoint.step if checkpoint else None,
        temperature=request.sampling_params.temperature,
        prompt=_decode(tokenizer, prompt[-MAX_PROMPT_TOKENS:], num_tokens=len(prompt)),
        sequences=[
            Continuation(
                text=_decode(
                    tokenizer, sequence.tokens.tolist()[:MAX_TOKENS], num_tokens=len(sequence.tokens)
                ),
                stop_reason=sequence.stop_reason,
            )
            for sequence in output.sequences[:MAX_SEQUENCES]
        ],
        num_hidden=max(len(output.sequences) - MAX_SEQUENCES, 0),
    )


def _decode(tokenizer: Any, tokens: Sequence[int], *, num_tokens: int) -> Text:
    num_hidden = num_tokens - len(tokens)
    if tokenizer is None:
        words = " ".join(str(token) for token in tokens)
        return Text(
            pieces=[Piece(text=words, is_special=False)], num_tokens=num_tokens, num_hidden=num_hidden
        )
    special = _special_tokens(tokenizer)
    pieces = [
        Piece(text=_join(tokenizer, list(group), is_special=is_special), is_special=is_special)
        for is_special, group in groupby(tokens, key=special.__contains__)
    ]
    return Text(pieces=pieces, num_tokens=num_tokens, num_hidden=num_hidden)


def _join(tokenizer: Any, tokens: list[int], *, is_special: bool) -> str:
    if is_special:
        return "".join(str(tokenizer.id_to_token(token)) for token in tokens)
    text: str = tokenizer.decode(tokens, skip_special_tokens=False)
    return text


def _special_tokens(tokenizer: Any) -> frozenset[int]:
    return frozenset(
        number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special
    )


def _tokenizer_of(base_model: str) -> Any:
    info = base_models.find(base_model)
    if info is None or info.folder is None:
        return None
    path = info.folder / "tokenizer.json"
    return _load(str(path), path.stat().st_mtime) if path.is_file() else None


@lru_cache(maxsize=8)
def _load(path: str, _changed_at: float) -> Any:
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a damaged file
        logger.warning("the tokenizer %s cannot be read: %s", path, error)
        return None
