"""Datum, ModelInput and TensorData: as they are on the wire, and as numpy arrays on the inside.

Axes: N input tokens of one datum, K targets per position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from runs.exceptions import RequestInvalid
from runs.schemas.losses import TARGET_TOKENS, UNSUPPORTED_TENSORS, LossSpec
from runs.schemas.problems import show
from runs.schemas.tensors import (
    MAX_TOKEN,
    Float32Array,
    Int64Array,
    WireArray,
    densify,
    floats,
    index_place,
    integers,
    reshape,
)

MAX_CHUNKS = 10_000
UNSUPPORTED_CHUNKS = ("image", "image_asset_pointer", "dmel")

Token = Annotated[int, Field(ge=0, le=MAX_TOKEN)]


class WireModel(BaseModel):
    """A JSON object from a client: no conversions between types, unknown keys left unread."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class Chunk(WireModel):
    """A stretch of text tokens, the only kind of chunk a text model reads."""

    type: Literal["encoded_text"] = "encoded_text"
    tokens: Annotated[list[Token], FailFast()]

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind in UNSUPPORTED_CHUNKS:
            raise ValueError(f"{kind} chunks are not supported: the base model reads text only")
        return value


class ModelInput(WireModel):
    """The tokens a model reads, in chunks that only the client tells apart."""

    chunks: Annotated[list[Chunk], Field(max_length=MAX_CHUNKS)]

    def array(self, *, place: str) -> Int64Array:
        """Return the tokens of all chunks in one array of at least one.

        Raises:
            RequestInvalid: there are no chunks, or no tokens in them.
        """
        if not self.chunks:
            raise RequestInvalid("must hold at least one chunk", place=f"{place}.chunks")
        chunks = [np.array(chunk.tokens, dtype=np.int64) for chunk in self.chunks]
        return check_not_empty(chunks[0] if len(chunks) == 1 else np.concatenate(chunks), place=place)


class TensorData(WireModel):
    """A tensor, flattened row by row; with the two sparse lists, a CSR matrix."""

    data: list[Any]
    dtype: Literal["float32", "int64"]
    shape: Annotated[list[Annotated[int, Field(le=2**40)]], Field(max_length=8)] | None = None
    sparse_crow_indices: list[Any] | None = None
    sparse_col_indices: list[Any] | None = None

    def array(self, *, place: str) -> WireArray:
        """Return the dense array: int64 or float32, (N,) or (N, K)."""
        read = integers if self.dtype == "int64" else floats
        values: WireArray = read(self.data, place=place)
        crow, col = self.sparse_crow_indices, self.sparse_col_indices
        if crow is None and col is None:
            return reshape(values, self.shape, place=place)
        if crow is None or col is None:
            raise RequestInvalid(
                "needs both sparse_crow_indices and sparse_col_indices, or neither", place=place
            )
        return densify(
            values,
            integers(crow, place=f"{place}.sparse_crow_indices"),
            col=integers(col, place=f"{place}.sparse_col_indices"),
            shape=self.shape,
            place=place,
        )


class Datum(WireModel):
    """One training example; `target_tokens[t]` is what should follow `model_input[t]`."""

    model_input: ModelInput
    loss_fn_inputs: Annotated[dict[str, TensorData], Field(max_length=64)]


@dataclass(frozen=True, kw_only=True, eq=False)
class DatumArrays:
    """One checked training example.

    Shapes:
        tokens: (N,)
        target_tokens: (N,) or, for cross_entropy, (N, K)
        inputs: each shaped like target_tokens
    """

    tokens: Int64Array
    target_tokens: Int64Array
    inputs: Mapping[str, Float32Array]


def is_read(name: str, spec: LossSpec, *, place: str) -> bool:
    """Return whether the loss reads the tensor; tensors that would change it are refused by name."""
    if name in UNSUPPORTED_TENSORS:
        raise RequestInvalid(
            "per-token values of this kind are not supported; leave the tensor out",
            place=f"{place}.loss_fn_inputs.{name}",
        )
    return name == TARGET_TOKENS or name in spec.required or name in spec.optional


def build_datum(
    tokens: Int64Array, tensors: Mapping[str, WireArray], *, spec: LossSpec, place: str
) -> DatumArrays:
    """Return the datum when its tensors are there, of the right type, shape and range.

    Raises:
        RequestInvalid: the first rule that a tensor breaks, at its place.
    """
    inputs_place = f"{place}.loss_fn_inputs"
    missing = [name for name in (TARGET_TOKENS, *spec.required) if name not in tensors]
    if missing:
        raise RequestInvalid(f"the loss function needs {', '.join(missing)}", place=inputs_place)
    targets = _check_targets(tensors[TARGET_TOKENS], tokens.size, spec, f"{inputs_place}.{TARGET_TOKENS}")
    inputs = {
        name: _check_input(array, name, targets=targets, spec=spec, place=f"{inputs_place}.{name}")
        for name, array in sorted(tensors.items())
        if name != TARGET_TOKENS
    }
    return DatumArrays(tokens=tokens, target_tokens=targets, inputs=inputs)


def check_not_empty(tokens: Int64Array, *, place: str) -> Int64Array:
    if not tokens.size:
        raise RequestInvalid("must hold at least one token", place=place)
    return tokens


def check_non_negative(array: WireArray, *, place: str) -> None:
    if array.size and array.min() < 0:
        negative = array < 0
        value = array.flat[int(np.argmax(negative))]
        raise RequestInvalid(f"must be at least 0, got {value}", place=index_place(place, negative))


def check_vocabulary(tokens: Int64Array, vocab_size: int, *, place: str) -> None:
    """Raise RequestInvalid when a token is not below `vocab_size`."""
    if tokens.max() >= vocab_size:
        outside = tokens >= vocab_size
        value = int(tokens.flat[int(np.argmax(outside))])
        raise RequestInvalid(
            f"token {value} is outside the vocabulary of {vocab_size} tokens",
            place=index_place(place, outside),
        )


def _check_targets(targets: WireArray, num_tokens: int, spec: LossSpec, place: str) -> Int64Array:
    if targets.dtype != np.int64:
        raise RequestInvalid(f"must have dtype int64, got {targets.dtype}", place=place)
    if targets.ndim == 2 and not spec.multi_target:
        raise RequestInvalid(
            f"has shape {list(targets.shape)}; two dimensions are for cross_entropy only", place=place
        )
    if targets.shape[0] != num_tokens:
        raise RequestInvalid(
            f"has {targets.shape[0]} values, but model_input has {num_tokens} tokens", place=place
        )
    if not targets.size:
        raise RequestInvalid(f"has shape {list(targets.shape)}, which holds nothing", place=place)
    check_non_negative(targets, place=place)
    return targets.astype(np.int64, copy=False)


def _check_input(
    array: WireArray, name: str, *, targets: Int64Array, spec: LossSpec, place: str
) -> Float32Array:
    if array.dtype != np.float32:
        raise RequestInvalid(f"must have dtype float32, got {array.dtype}", place=place)
    if array.shape != targets.shape:
        raise RequestInvalid(f"has {_extent(array)}, but target_tokens has {_extent(targets)}", place=place)
    if not np.isfinite(array).all():
        not_finite = ~np.isfinite(array)
        value = float(array.flat[int(np.argmax(not_finite))])
        raise RequestInvalid(f"must be finite, got {show(value)}", place=index_place(place, not_finite))
    if name == "weights" and not spec.negative_weights:
        check_non_negative(array, place=place)
    return array.astype(np.float32, copy=False)


def _extent(array: WireArray) -> str:
    return f"{array.size} values" if array.ndim == 1 else f"shape {list(array.shape)}"
