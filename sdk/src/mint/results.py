"""Results of operations: tinker's own, with `.loss` where there is one.

A result also answers to the calls of a future with itself. So code that awaits the same thing
once or twice gets the same object.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Self

from tinker import types


class Settled:
    """Something that is already there, for code that would wait for it.

    Named last among the bases: only then can an object of tinker's class be given the new class.
    """

    __slots__ = ()

    def result(self, timeout: float | None = None) -> Self:
        """Return this object."""
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        """Return this object."""
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self.result_async().__await__()


class ForwardBackwardOutput(types.ForwardBackwardOutput, Settled):
    """The result of `forward` and `forward_backward`."""

    @property
    def loss(self) -> float:
        """The loss per unit of token weight where the server reports that weight, else the loss sum."""
        weight_sum = self.metrics.get("loss_weight:sum", 0.0)
        loss_sum = self.metrics["loss:sum"]
        return loss_sum / weight_sum if weight_sum > 0 else loss_sum


class CustomLossOutput(ForwardBackwardOutput):
    """The result of `forward_backward_custom`. Its server metrics describe a surrogate loss."""

    @property
    def loss(self) -> float:
        """The value that the caller's loss function returned."""
        return vars(self).get("_custom_loss", self.metrics.get("loss:sum"))


class OptimStepResponse(types.OptimStepResponse, Settled):
    """The result of `optim_step`."""


class SaveWeightsResponse(types.SaveWeightsResponse, Settled):
    """The result of `save_state`."""


class SaveWeightsForSamplerResponse(types.SaveWeightsForSamplerResponse, Settled):
    """The result of `save_weights_for_sampler`."""


class LoadWeightsResponse(types.LoadWeightsResponse, Settled):
    """The result of `load_state`."""


class SampleResponse(types.SampleResponse, Settled):
    """The result of `sample`."""


_SETTLED_CLASSES: dict[type, type] = {
    cls.__base__: cls
    for cls in (
        ForwardBackwardOutput,
        OptimStepResponse,
        SaveWeightsResponse,
        SaveWeightsForSamplerResponse,
        LoadWeightsResponse,
        SampleResponse,
    )
}


def settle(result: Any) -> Any:
    """Give a tinker result its class from this module, in place. Other values pass through."""
    cls = _SETTLED_CLASSES.get(type(result))
    if cls is not None:
        # Results are frozen, and object.__setattr__ is the way around that.
        object.__setattr__(result, "__class__", cls)
    return result


def settle_custom(result: Any, custom_loss: float | None) -> Any:
    """Turn the result of a custom loss into a CustomLossOutput, in place.

    Args:
        custom_loss: the caller's loss, or None where tinker has put it into `loss:sum`.
    """
    object.__setattr__(result, "__class__", CustomLossOutput)
    if custom_loss is not None:
        object.__setattr__(result, "_custom_loss", custom_loss)
    return result
