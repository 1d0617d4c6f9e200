"""Finding stop strings in generated tokens. Reads tokenizer.json beside the base model, when asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from gpuworker.engine.exceptions import SamplingError

_SPARE_TOKENS = 4


class TextDecoder:
    """The base model's tokenizer, loaded at the first stop string."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "tokenizer.json"

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if not self._path.is_file():
            raise SamplingError("stop strings need a tokenizer.json beside the base model")
        return Tokenizer.from_file(str(self._path))

    def check(self, stop_strings: Sequence[str]) -> None:
        """Raise SamplingError if stop strings are wanted and cannot be found in text."""
        if any(not text for text in stop_strings):
            raise SamplingError("a stop string is empty")
        if stop_strings:
            _ = self._tokenizer

    def ends_with_stop(self, tokens: Sequence[int], stop_strings: Sequence[str]) -> bool:
        """Return whether the last token completes a stop string.

        Only a window that must hold the longest string is decoded: every token is at least one
        byte of text. Special tokens count as their text, so they can be named as strings.
        """
        if not stop_strings:
            return False
        longest = max(len(text.encode()) for text in stop_strings)
        window = list(tokens[-(longest + _SPARE_TOKENS) :])
        text = self._tokenizer.decode(window, skip_special_tokens=False)
        return any(stop in text for stop in stop_strings)
