"""Rotary embedding in three kernels each way; transformers takes five and eleven, with copies.

It is a function of the model's source, not a module, so each attention layer gets a `forward` in which its name
means the one here.
Axes: H heads, T rows of the packed batch, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, Final

import torch
from torch import Tensor, nn

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_NAME: Final = "apply_rotary_pos_emb"


def fuse(model: nn.Module) -> None:
    """Let every attention layer rotate as here; those that rotate in another way, such as a part only, stay as they are."""
    for module in model.modules():
        forward: Any = type(module).forward
        if hasattr(module, "q_proj") and _is_plain(getattr(forward, "__globals__", {}).get(_NAME)):
            module.forward = _with_name(forward, rotate).__get__(module)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return query and key turned by the angles of their rows.

    Shapes:
        query, key: (1, H, T, E); cos, sin: (1, T, E), whose two halves are the same.
    """
    query_turned: Tensor = _Rotation.apply(query, cos, sin)  # type: ignore[no-untyped-call]
    key_turned: Tensor = _Rotation.apply(key, cos, sin)  # type: ignore[no-untyped-call]
    return query_turned, key_turned


class _Rotation(torch.autograd.Function):
    """Heads turned by angles that need no gradient; backward turns by the opposite ones."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(heads, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


def _turn(heads: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    output = heads * cos[:, None]
    sines = sin[:, None, :, : sin.shape[-1] // 2]
    (left, right), (output_left, output_right) = heads.chunk(2, dim=-1), output.chunk(2, dim=-1)
    output_left.addcmul_(right, sines, value=-sign)
    output_right.addcmul_(left, sines, value=sign)
    return output


def _with_name(function: FunctionType, rotate: Rotate) -> FunctionType:
    """Return a copy of a function that finds another one under the name of the rotation."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, _NAME: rotate},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@cache
def _is_plain(theirs: Rotate | None) -> bool:
    """Return whether a model's rotation gives what the one here gives."""
    if theirs is None:
        return False
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (2, 1))
    cos, sin = torch.randn(2, 1, 3, 4, generator=generator).repeat(1, 1, 1, 2)
    try:
        expected = theirs(query, key, cos, sin)
    except (RuntimeError, TypeError):
        return False
    return not _turns_a_part(theirs) and all(
        torch.allclose(ours, other)
        for ours, other in zip(rotate(query, key, cos, sin), expected, strict=True)
    )


def _turns_a_part(theirs: Rotate) -> bool:
    """Return whether a rotation takes angles for the first numbers of a head only."""
    heads, angles = torch.ones(1, 1, 1, 8), torch.ones(1, 1, 4)
    try:
        theirs(heads, heads, angles, angles)
    except RuntimeError:
        return False
    return True
