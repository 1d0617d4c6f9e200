"""The service client, where everything starts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future as ConcurrentFuture
from typing import Any

import tinker
from tinker import types

from ._upstream import METHODS_RETURN_FUTURES, start, undeprecated
from .future import ClientFuture, Future, converted, in_thread, submitted
from .order import SubmissionOrder
from .rest import RestClient, adopt_rest_client
from .sampling import SamplingClient, adopt_sampling_client, sampling_client_of
from .training import TrainingClient, adopt_training_client, training_client_of


class ServiceClient(tinker.ServiceClient):
    """tinker's ServiceClient; `*_async` methods submit at once and return a Future."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._order = SubmissionOrder()

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """Return what the server offers, such as its base models."""
        return undeprecated(super().get_server_capabilities.__func__)(self)

    def get_server_capabilities_async(self) -> Future[types.GetServerCapabilitiesResponse]:
        """Submit `get_server_capabilities()` and return its Future."""
        return Future(in_thread(self.get_server_capabilities))

    def create_lora_training_client(self, *args: Any, **kwargs: Any) -> TrainingClient:
        """Create a training run. Takes what tinker's method takes."""
        return training_client_of(super().create_lora_training_client(*args, **kwargs))

    def create_lora_training_client_async(self, *args: Any, **kwargs: Any) -> Future[TrainingClient]:
        """Submit `create_lora_training_client(...)` and return the Future of the client."""
        return self._create("create_lora_training_client", adopt_training_client, *args, **kwargs)

    def create_training_client_from_state(self, *args: Any, **kwargs: Any) -> TrainingClient:
        """Create a training run from a checkpoint's weights. Takes what tinker's method takes."""
        return training_client_of(super().create_training_client_from_state(*args, **kwargs))

    def create_training_client_from_state_async(self, *args: Any, **kwargs: Any) -> Future[TrainingClient]:
        """Submit `create_training_client_from_state(...)` and return the Future of the client."""
        return self._resume("create_training_client_from_state", *args, **kwargs)

    def create_training_client_from_state_with_optimizer(self, *args: Any, **kwargs: Any) -> TrainingClient:
        """Create a training run from a checkpoint's weights and optimizer state."""
        pending = super().create_training_client_from_state_with_optimizer(*args, **kwargs)
        return training_client_of(pending)

    def create_training_client_from_state_with_optimizer_async(
        self, *args: Any, **kwargs: Any
    ) -> Future[TrainingClient]:
        """Submit the call without `_async` and return the Future of the client."""
        return self._resume("create_training_client_from_state_with_optimizer", *args, **kwargs)

    def create_sampling_client(self, *args: Any, **kwargs: Any) -> SamplingClient:
        """Create a client that samples from a base model or a checkpoint."""
        return sampling_client_of(super().create_sampling_client(*args, **kwargs))

    def create_sampling_client_async(self, *args: Any, **kwargs: Any) -> Future[SamplingClient]:
        """Submit `create_sampling_client(...)` and return the Future of the client."""
        return self._create("create_sampling_client", adopt_sampling_client, *args, **kwargs)

    def create_rest_client(self) -> RestClient:
        """Create a client that lists and manages runs and checkpoints."""
        return adopt_rest_client(undeprecated(super().create_rest_client.__func__)(self))

    def _create(self, name: str, adopt: Callable[[Any], Any], *args: Any, **kwargs: Any) -> ClientFuture[Any]:
        def call() -> ConcurrentFuture[Any]:
            return start(tinker.ServiceClient, name, self, *args, **kwargs)

        return submitted(lambda: ClientFuture(converted(self._when_open(call), adopt)))

    def _resume(self, name: str, *args: Any, **kwargs: Any) -> ClientFuture[Any]:
        if METHODS_RETURN_FUTURES:
            return self._create(name, adopt_training_client, *args, **kwargs)
        # tinker 0.22 blocks on the way, even in its coroutine, when given another account's token.
        return ClientFuture(in_thread(lambda: getattr(self, name)(*args, **kwargs)))

    def _when_open(self, call: Callable[[], ConcurrentFuture[Any]]) -> ConcurrentFuture[Any]:
        """Submit the call when the session is open, which tinker 0.38 does at its first use."""
        if METHODS_RETURN_FUTURES and self._session_holder is None:
            self._order.hold()
            submission = self._order.submit(call)
            in_thread(self._open_session)
            return submission
        return self._order.submit(call)

    def _open_session(self) -> None:
        try:
            self._get_session_holder()
        finally:
            self._order.release()
