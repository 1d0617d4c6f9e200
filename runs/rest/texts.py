"""Tokens as text, for answers."""

from __future__ import annotations

from collections.abc import Callable

from runs.exceptions import RequestInvalid
from runs.recipes.rendering import renderer_of


def decoder_of(base_model: str) -> Callable[[list[int]], str]:
    """Return what turns sampled tokens into text, without the token that ended them.

    Where the base model is not on offer any more its tokens are returned as numbers.
    """
    try:
        renderer = renderer_of(base_model)
    except RequestInvalid:
        return lambda tokens: " ".join(map(str, tokens))

    def decode(tokens: list[int]) -> str:
        ends = renderer.stop_tokens
        return renderer.decode(tokens[:-1] if tokens and tokens[-1] in ends else tokens)

    return decode
