"""The training client."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from concurrent.futures import Future as ConcurrentFuture
from typing import Any

import tinker
from tinker import types

from ._upstream import METHODS_RETURN_FUTURES, behind, start
from .future import ClientFuture, Future, converted, submitted
from .order import SubmissionOrder
from .results import Settled, settle_custom
from .sampling import SamplingClient, adopt_sampling_client, sampling_client_of


def _in_order(name: str) -> Callable[..., Future[Any]]:
    upstream = getattr(tinker.TrainingClient, name)

    @functools.wraps(upstream)
    def submit(self: TrainingClient, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._submit(lambda: upstream(self, *args, **kwargs))

    return submit


def _at_once(name: str) -> Callable[..., Future[Any]]:
    def submit(self: TrainingClient, *args: Any, **kwargs: Any) -> Future[Any]:
        return submitted(lambda: getattr(self, name)(*args, **kwargs))

    submit.__name__ = f"{name}_async"
    submit.__qualname__ = f"TrainingClient.{name}_async"
    submit.__doc__ = f"Submit `{name}(...)` and return its Future."
    return submit


class TrainingClient(tinker.TrainingClient, Settled):
    """tinker's TrainingClient; operations are submitted at once, in the order of the calls.

    Methods and their `*_async` twins take the same arguments and return the same Future.
    """

    _order: SubmissionOrder

    forward = _in_order("forward")
    forward_backward = _in_order("forward_backward")
    optim_step = _in_order("optim_step")
    save_state = _in_order("save_state")
    if METHODS_RETURN_FUTURES:
        save_weights_external = _in_order("save_weights_external")
        save_weights_external_async = _at_once("save_weights_external")

    forward_async = _at_once("forward")
    forward_backward_async = _at_once("forward_backward")
    forward_backward_custom_async = _at_once("forward_backward_custom")
    optim_step_async = _at_once("optim_step")
    save_state_async = _at_once("save_state")
    save_weights_for_sampler_async = _at_once("save_weights_for_sampler")
    load_state_async = _at_once("load_state")
    load_state_with_optimizer_async = _at_once("load_state_with_optimizer")

    def forward_backward_custom(
        self, data: list[types.Datum], loss_fn: Callable[..., Any], **kwargs: Any
    ) -> Future[types.ForwardBackwardOutput]:
        """Compute gradients of a loss that is written in torch and runs in this process.

        Args:
            loss_fn: takes (data, list of logprob tensors), returns (loss tensor, metrics).
        """
        if METHODS_RETURN_FUTURES:
            upstream = super().forward_backward_custom
            submission = self._order.submit(lambda: behind(upstream(data, loss_fn, **kwargs)))
            return Future(converted(submission, lambda result: settle_custom(result, None)))
        return Future(self._order.submit(lambda: self._run_custom_loss(data, loss_fn, kwargs)))

    def _run_custom_loss(
        self, data: list[types.Datum], loss_fn: Callable[..., Any], kwargs: dict[str, Any]
    ) -> ConcurrentFuture[types.ForwardBackwardOutput]:
        # tinker 0.22 takes the sequence number of the backward pass only after the forward pass
        # has come back, so everything later has to be kept back until then.
        recorded: list[float] = []

        def recording_loss(*inputs: Any) -> tuple[Any, dict[str, float]]:
            loss, metrics = loss_fn(*inputs)
            recorded.append(float(loss.detach().sum()))
            return loss, metrics

        plain = self._plain()

        async def run() -> types.ForwardBackwardOutput:
            try:
                backward = await plain.forward_backward_custom_async(data, recording_loss, **kwargs)
            finally:
                self._order.release()
            return settle_custom(await backward.result_async(), recorded[0])

        self._order.hold()
        return converted(self.holder.run_coroutine_threadsafe(run()).future())

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> Future[types.SaveWeightsForSamplerResponse]:
        """Save the current weights for sampling under a name.

        Args:
            ttl_seconds: lifetime of the checkpoint, None for no end.
            user_metadata: needs tinker 0.38.
        """
        # tinker's public method takes its sequence number in another thread, which lets a later
        # call overtake it; this part takes it here.
        return self._submit(
            lambda: self._save_weights_for_sampler_impl(
                name, ttl_seconds, *_version_arguments(user_metadata, "snapshot")
            )
        )

    def load_state(
        self, path: str, weights_access_token: str | None = None
    ) -> Future[types.LoadWeightsResponse]:
        """Load the weights of a checkpoint; the optimizer starts anew."""
        return self._submit(
            lambda: self._load_state_impl(path, optimizer=False, weights_access_token=weights_access_token)
        )

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> Future[types.LoadWeightsResponse]:
        """Load the weights and the optimizer state of a checkpoint."""
        return self._submit(
            lambda: self._load_state_impl(path, optimizer=True, weights_access_token=weights_access_token)
        )

    def get_info_async(self) -> Future[types.GetInfoResponse]:
        """Ask for the model's description and return the Future of it."""
        return submitted(lambda: Future(start(tinker.TrainingClient, "get_info", self)))

    def create_sampling_client(self, model_path: str, *args: Any, **kwargs: Any) -> SamplingClient:
        """Create a sampling client for saved weights."""
        return sampling_client_of(super().create_sampling_client(model_path, *args, **kwargs))

    def create_sampling_client_async(self, *args: Any, **kwargs: Any) -> Future[SamplingClient]:
        """Submit `create_sampling_client(...)` and return the Future of the client."""
        return submitted(
            lambda: ClientFuture(
                converted(
                    start(tinker.TrainingClient, "create_sampling_client", self, *args, **kwargs),
                    adopt_sampling_client,
                )
            )
        )

    def save_weights_and_get_sampling_client(
        self, name: str | None = None, *args: Any, **kwargs: Any
    ) -> SamplingClient:
        """Save the current weights unnamed and create a sampling client for them."""
        _warn_of_name(name)
        future = self._sampling_client_of_current_weights(*args, **kwargs)
        return future if METHODS_RETURN_FUTURES else future.result()

    def save_weights_and_get_sampling_client_async(
        self, name: str | None = None, *args: Any, **kwargs: Any
    ) -> Future[SamplingClient]:
        """Submit `save_weights_and_get_sampling_client(...)` and return the Future of the client."""
        _warn_of_name(name)
        return submitted(lambda: self._sampling_client_of_current_weights(*args, **kwargs))

    def _sampling_client_of_current_weights(
        self, retry_config: Any = None, **kwargs: Any
    ) -> ClientFuture[SamplingClient]:
        kind = kwargs.pop("kind", "snapshot")
        saved = self._order.submit(
            lambda: behind(self._save_weights_for_sampler_impl(None, None, *_version_arguments(None, kind)))
        )
        if METHODS_RETURN_FUTURES:
            kwargs["base_model"] = self.get_info().model_data.model_name

        async def create() -> tinker.SamplingClient:
            sampling_session_id = await Future(saved)
            return await tinker.SamplingClient.create(
                self.holder, sampling_session_id=sampling_session_id, retry_config=retry_config, **kwargs
            )

        created = self.holder.run_coroutine_threadsafe(create()).future()
        return ClientFuture(converted(created, adopt_sampling_client))

    def _submit(self, call: Callable[[], Any]) -> Future[Any]:
        return Future(converted(self._order.submit(lambda: behind(call()))))

    def _plain(self) -> tinker.TrainingClient:
        """Return this client with tinker's own methods: the state is one and the same."""
        plain = object.__new__(tinker.TrainingClient)
        plain.__dict__ = self.__dict__
        return plain


def _version_arguments(user_metadata: dict[str, str] | None, kind: str) -> tuple[Any, ...]:
    if METHODS_RETURN_FUTURES:
        return (user_metadata, kind)
    if user_metadata is not None or kind != "snapshot":
        raise TypeError("user_metadata and kind need tinker 0.38")
    return ()


def _warn_of_name(name: str | None) -> None:
    if name is not None:
        warnings.warn(
            "'name' has no effect: these weights are saved unnamed. Use save_weights_for_sampler(name) "
            "to keep them.",
            DeprecationWarning,
            stacklevel=3,
        )


def adopt_training_client(client: tinker.TrainingClient) -> TrainingClient:
    """Make tinker's client one of this package's, in place."""
    client.__class__ = TrainingClient
    if "_order" not in vars(client):
        client._order = SubmissionOrder()
    return client


def training_client_of(pending: Any) -> Any:
    """Adopt the client that tinker returned, or the future of one."""
    if isinstance(pending, tinker.APIFuture):
        return ClientFuture(converted(behind(pending), adopt_training_client))
    return adopt_training_client(pending)
