"""Errors of the compute engine; they know a category and nothing of HTTP.

EngineError (category "server")
+ LoraSpecError         user    an adapter shape that this base model cannot carry
+ DatumError            user    a datum cannot be computed: shape, token id, missing tensor
+ LossFunctionError     user    unknown loss, or a config key or tensor it does not take
+ NonFiniteError        user    the loss or a gradient is NaN or infinite
+ SamplingError         user    a sampling request that the model cannot serve
+ AdapterNotLoaded      server  an operation names an adapter this engine does not hold
+ CheckpointError       user    files that do not fit the adapter, or are torn
+ BaseModelError        server  a base model directory that cannot be loaded
+ OutOfMemory           server  the device has no room for the operation
"""

from __future__ import annotations

from typing import ClassVar


class EngineError(Exception):
    """The compute engine failed."""

    category: ClassVar[str] = "server"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class LoraSpecError(EngineError):
    """The adapter shape does not suit the base model."""

    category = "user"


class DatumError(EngineError):
    """A datum cannot be computed."""

    category = "user"


class LossFunctionError(EngineError):
    """The loss function is unknown or was given the wrong inputs."""

    category = "user"


class NonFiniteError(EngineError):
    """The loss or a gradient is not finite."""

    category = "user"


class SamplingError(EngineError):
    """The sampling request cannot be served by this model."""

    category = "user"


class AdapterNotLoaded(EngineError):
    """The adapter is not loaded in this engine."""


class CheckpointError(EngineError):
    """The checkpoint does not fit the adapter or is damaged."""

    category = "user"


class BaseModelError(EngineError):
    """The base model cannot be loaded."""


class OutOfMemory(EngineError):
    """The device has no room for this operation."""
