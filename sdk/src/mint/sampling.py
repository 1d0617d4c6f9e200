"""The sampling client."""

from __future__ import annotations

from typing import Any

import tinker

from ._upstream import behind, start
from .future import ClientFuture, Future, converted, submitted
from .results import Settled


class SamplingClient(tinker.SamplingClient, Settled):
    """tinker's SamplingClient; `*_async` methods submit at once and return a Future."""

    def sample_async(self, *args: Any, **kwargs: Any) -> Future[tinker.SampleResponse]:
        """Submit `sample(...)` and return its Future."""
        return submitted(lambda: Future(converted(behind(self.sample(*args, **kwargs)))))

    def compute_logprobs_async(self, *args: Any, **kwargs: Any) -> Future[list[float | None]]:
        """Submit `compute_logprobs(...)` and return its Future."""
        return submitted(lambda: Future(converted(behind(self.compute_logprobs(*args, **kwargs)))))

    def get_base_model_async(self) -> Future[str]:
        """Ask for the name of the base model and return the Future of it."""
        return submitted(lambda: Future(start(tinker.SamplingClient, "get_base_model", self)))

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (_rebuild, super().__reduce__())


def _rebuild(create: Any, args: tuple[Any, ...]) -> SamplingClient:
    return adopt_sampling_client(create(*args))


def adopt_sampling_client(client: tinker.SamplingClient) -> SamplingClient:
    """Make tinker's client one of this package's, in place."""
    client.__class__ = SamplingClient
    return client


def sampling_client_of(pending: Any) -> Any:
    """Adopt the client that tinker returned, or the future of one."""
    if isinstance(pending, tinker.APIFuture):
        return ClientFuture(converted(behind(pending), adopt_sampling_client))
    return adopt_sampling_client(pending)
