"""Checks and conversions from wire tensors (JSON lists, protobuf bytes, sparse CSR) to numpy arrays.

Axes: N input tokens of one datum, K targets per position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from runs.exceptions import RequestInvalid
from runs.schemas.problems import show
from runs.schemas.tinker_pb2 import DType, SparseCsr, Tensor

Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]
WireArray: TypeAlias = Int64Array | Float32Array

# A few bytes of CSR can stand for terabytes; 64 MiB of int64 is the most one tensor may become.
MAX_SPARSE_ELEMENTS = 8 << 20
MAX_TOKEN = 2**31 - 1
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def integers(values: Sequence[object], *, place: str) -> Int64Array:
    """Return JSON integers as an array; booleans and fractions are refused by index."""
    _check_types(values, (int,), "an integer", place)
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        index = next(i for i, value in enumerate(values) if not _fits_int64(value))
        raise RequestInvalid(
            f"must fit in 64 bits, got {show(values[index])}", place=f"{place}[{index}]"
        ) from error


def floats(values: Sequence[Any], *, place: str) -> Float32Array:
    """Return JSON numbers as float32; what is not finite in float32 is refused by index."""
    _check_types(values, (int, float), "a number", place)
    try:
        exact = np.array(values, dtype=np.float64)
    except OverflowError:  # an integer of more than 308 digits' size
        exact = np.array([_clamp(value) for value in values], dtype=np.float64)
    fits = np.abs(exact) <= _FLOAT32_MAX
    if not fits.all():
        index = int(np.argmin(fits))
        raise RequestInvalid(
            f"must be a finite float32, got {show(values[index])}", place=f"{place}[{index}]"
        )
    return exact.astype(np.float32)


def reshape(values: WireArray, shape: Sequence[int] | None, *, place: str) -> WireArray:
    """Return the values in their (N,) or (N, K) shape; no shape means (N,)."""
    if shape is None:
        return values
    _check_shape(shape, place)
    num_needed = math.prod(shape)
    if num_needed != values.size:
        raise RequestInvalid(
            f"has {values.size} values, but its shape {list(shape)} needs {num_needed}", place=place
        )
    return values.reshape(tuple(shape))


def densify(
    values: WireArray, crow: Int64Array, *, col: Int64Array, shape: Sequence[int] | None, place: str
) -> WireArray:
    """Return the (N, K) array of a CSR matrix; what it does not list is 0."""
    if shape is None or len(shape) != 2:
        raise RequestInvalid("a sparse tensor needs a shape of 2 dimensions", place=place)
    _check_shape(shape, place)
    num_rows, num_cols = shape
    if num_rows * num_cols > MAX_SPARSE_ELEMENTS:
        raise RequestInvalid(
            f"a sparse tensor of shape {list(shape)} is too large: at most {MAX_SPARSE_ELEMENTS} elements",
            place=place,
        )
    _check_csr(values, crow, col=col, num_rows=num_rows, num_cols=num_cols, place=place)
    flat = np.repeat(np.arange(num_rows), np.diff(crow)) * num_cols + col
    if np.unique(flat).size != flat.size:
        raise RequestInvalid("a sparse tensor lists one element twice", place=f"{place}.sparse_col_indices")
    dense = np.zeros(num_rows * num_cols, dtype=values.dtype)
    dense[flat] = values
    return dense.reshape(num_rows, num_cols)


def from_proto(tensor: Tensor, *, place: str) -> WireArray:
    """Return the array of a protobuf tensor: int64 for the integer types, float32 for the others."""
    shape = list(tensor.shape) or None
    if tensor.HasField("sparse_csr"):
        csr: SparseCsr = tensor.sparse_csr
        values = _unpack(csr.values, tensor.dtype, place=place)
        crow = _int64s(csr.crow_indices, place=f"{place}.crow_indices")
        col = _int64s(csr.col_indices, place=f"{place}.col_indices")
        return densify(values, crow, col=col, shape=shape, place=place)
    return reshape(_unpack(tensor.dense, tensor.dtype, place=place), shape, place=place)


def int32s(packed: bytes, *, place: str) -> Int64Array:
    return _frombuffer(packed, "<i4", place=place).astype(np.int64)


def index_place(place: str, flags: npt.NDArray[np.bool_]) -> str:
    """Return `place[7]` or `place[7][2]` for the first true flag."""
    first = np.unravel_index(int(np.argmax(flags)), flags.shape)
    return place + "".join(f"[{int(index)}]" for index in first)


def _unpack(packed: bytes, dtype: int, *, place: str) -> WireArray:
    if dtype == DType.DTYPE_FLOAT32:
        return _frombuffer(packed, "<f4", place=place)
    if dtype == DType.DTYPE_INT64:
        return _int64s(packed, place=place)
    if dtype == DType.DTYPE_INT32:
        return int32s(packed, place=place)
    if dtype == DType.DTYPE_BFLOAT16:
        upper = _frombuffer(packed, "<u2", place=place).astype(np.uint32)
        return (upper << 16).view(np.float32)
    raise RequestInvalid(f"has the unknown dtype {dtype}; use float32, int64, int32 or bfloat16", place=place)


def _int64s(packed: bytes, *, place: str) -> Int64Array:
    return _frombuffer(packed, "<i8", place=place)


def _frombuffer(packed: bytes, dtype: str, *, place: str) -> npt.NDArray[Any]:
    item_bytes = np.dtype(dtype).itemsize
    if len(packed) % item_bytes:
        raise RequestInvalid(f"has {len(packed)} bytes, which is no multiple of {item_bytes}", place=place)
    return np.frombuffer(packed, dtype=dtype)


def _check_types(values: Sequence[object], allowed: tuple[type, ...], what: str, place: str) -> None:
    if set(map(type, values)) - set(allowed):
        index = next(i for i, value in enumerate(values) if type(value) not in allowed)
        raise RequestInvalid(f"must be {what}, got {show(values[index])}", place=f"{place}[{index}]")


def _check_shape(shape: Sequence[int], place: str) -> None:
    if len(shape) not in (1, 2):
        raise RequestInvalid(f"has {len(shape)} dimensions, 1 or 2 are allowed", place=f"{place}.shape")
    for index, size in enumerate(shape):
        if size < 0:
            raise RequestInvalid(f"must be at least 0, got {size}", place=f"{place}.shape[{index}]")


def _check_csr(
    values: WireArray, crow: Int64Array, *, col: Int64Array, num_rows: int, num_cols: int, place: str
) -> None:
    if crow.size != num_rows + 1:
        raise RequestInvalid(
            f"has {crow.size} entries, but {num_rows} rows need {num_rows + 1}",
            place=f"{place}.sparse_crow_indices",
        )
    if crow[0] != 0 or crow[-1] != values.size or (crow[1:] < crow[:-1]).any():
        raise RequestInvalid(
            f"must rise from 0 to the number of values, {values.size}", place=f"{place}.sparse_crow_indices"
        )
    if col.size != values.size:
        raise RequestInvalid(
            f"has {col.size} entries for {values.size} values", place=f"{place}.sparse_col_indices"
        )
    outside = (col < 0) | (col >= num_cols)
    if outside.any():
        index = int(np.argmax(outside))
        raise RequestInvalid(
            f"must be 0 to {num_cols - 1}, got {int(col[index])}",
            place=f"{place}.sparse_col_indices[{index}]",
        )


def _fits_int64(value: object) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63


def _clamp(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")
