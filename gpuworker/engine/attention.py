"""Attention over packed sequences, registered once with transformers under ATTENTION_NAME.

Every sequence of the batch attends to itself only. Knows nothing of adapters; `kv_cache` has the
counterpart for sampling.
Axes: T rows of the packed batch, N rows of one sequence, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import signature
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from gpuworker.engine.block_attention import attend_by_blocks
from gpuworker.engine.exceptions import BaseModelError
from gpuworker.engine.lora import Route, Scoring

ATTENTION_NAME = "mintweb_packed"
_SHORT_ROWS = 64
"""Up to so many rows torch's kernel in float32 is the faster one."""


class PackedAttention:
    """Causal attention of a training batch: adjacent sequences of the given lengths.

    On a CPU the sequences go one by one, which never computes padding and makes a sequence's bits
    independent of its neighbours: by blocks where a sequence is long enough for them, else through
    `scaled_dot_product_attention` in float32, which is faster there than in half precision. CUDA half precision
    takes the bundled varlen flash kernel.
    """

    def __init__(self, lengths: list[int], *, device: torch.device) -> None:
        self.lengths = lengths
        self.max_length = max(lengths)
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.bounds = bounds.to(device)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return the attention output.

        Shapes:
            query: (1, H, T, E); key, value: (1, G, T, E); returns (1, T, H, E).
        """
        if query.is_cuda and query.dtype != torch.float32 and scoring.softcap is None:
            return self._attend_varlen(query, key, value, scoring)
        kinds = groupby(self.lengths, key=partial(_goes_by_blocks, query, scoring))
        stretches = [(is_blocked, list(lengths)) for is_blocked, lengths in kinds]
        rows = [sum(lengths) for _, lengths in stretches]
        outputs = []
        parts = (torch.split(heads, rows, dim=2) for heads in (query, key, value))
        for (is_blocked, lengths), q, k, v in zip(stretches, *parts, strict=True):
            if is_blocked:
                outputs.append(attend_by_blocks(q, k, v, lengths, scaling=scoring.scaling))
            else:
                outputs.append(_attend_one_by_one(q, k, v, lengths, scoring))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _attend_varlen(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # CUDA only: importing it loads its kernels

        # torch before 2.12 groups heads by itself and has no word for it.
        knows_groups = "enable_gqa" in signature(varlen_attn).parameters
        grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if knows_groups else {}
        output = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            self.bounds,
            self.bounds,
            self.max_length,
            self.max_length,
            scale=scoring.scaling,
            window_size=(-1 if scoring.window is None else scoring.window - 1, 0),
            **grouped,
        )
        return cast(Tensor, output).unsqueeze(0)


def _goes_by_blocks(query: Tensor, scoring: Scoring, num_rows: int) -> bool:
    """Return whether blocks compute a sequence: on a CPU a long one that sees all its keys, which decides by itself."""
    is_plain = scoring.softcap is None and (scoring.window is None or num_rows <= scoring.window)
    return num_rows > _SHORT_ROWS and is_plain and not query.is_cuda


def _attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scoring: Scoring
) -> Tensor:
    """Return causal attention of adjacent sequences, through float32: all at once, a call for each costs more.

    Shapes:
        query: (1, H, T, E); key, value: (1, G, T, E); returns (1, T, H, E).
    """
    heads = (torch.split(part.float(), list(lengths), dim=2) for part in (query, key, value))
    outputs = [attend_causal(q, k, v, scoring).transpose(1, 2) for q, k, v in zip(*heads, strict=True)]
    return torch.cat(outputs, dim=1).to(query.dtype)


def attend_causal(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Return causal attention of one sequence, or of its last N rows over all L keys.

    Shapes:
        query: (1, H, N, E); key, value: (1, G, L, E), N = L or N = 1; returns (1, H, N, E).
    """
    num_rows, num_keys, window = query.shape[2], key.shape[2], scoring.window
    if window is not None and num_rows == 1 and num_keys > window:
        key, value, num_keys = key[:, :, -window:], value[:, :, -window:], window
    masked = window is not None and num_rows > window
    if scoring.softcap is None and not masked:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=num_rows > 1, scale=scoring.scaling, enable_gqa=True
        )
    return attend_masked(
        query, key, value, causal_mask(num_rows, num_keys, window, device=query.device), scoring
    )


def attend_masked(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scoring: Scoring) -> Tensor:
    """Return attention to the keys that a mask allows.

    With a softcap the scores pass through `softcap * tanh(scores / softcap)` (Gemma 2), for which torch's function has no word.
    """
    scaling, _, softcap = scoring
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query.matmul(key.transpose(2, 3)) * scaling
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.softmax(scores, dim=-1).matmul(value)


def causal_mask(num_rows: int, num_keys: int, window: int | None, *, device: torch.device) -> Tensor:
    """Return which keys each of the last `num_rows` rows may see, bool (num_rows, num_keys)."""
    row = torch.arange(num_keys - num_rows, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    allowed = key <= row
    return allowed if window is None else allowed & (row - key < window)


def install(model: nn.Module, route: Route) -> None:
    """Let every attention layer of a transformers model find the route; numbers the layers.

    Raises:
        BaseModelError: the model does not choose its attention through AttentionInterface.
    """
    AttentionInterface.register(ATTENTION_NAME, _attend)
    for number, module in enumerate(m for m in model.modules() if hasattr(m, "q_proj")):
        module.mintweb_route = route  # type: ignore[assignment]
        module.mintweb_layer = number  # type: ignore[assignment]
    model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    if model.config._attn_implementation != ATTENTION_NAME:  # type: ignore[union-attr]
        raise BaseModelError(f"{type(model).__name__} does not take another attention function")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Hand one layer's heads to the current batch; the signature is that of transformers."""
    route = cast(Route, module.mintweb_route)
    if route.attention is None:
        raise RuntimeError("the model ran outside of BaseModel.routed")
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    return route.attention(cast(int, module.mintweb_layer), query, key, value, scoring), None
