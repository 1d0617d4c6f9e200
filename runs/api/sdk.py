"""The SDK's routes under /api/v1/; `endpoint` and `operation_endpoint` ask for a key, `open_endpoint` does not."""

from __future__ import annotations

from typing import Any, cast

from django.urls import URLPattern, path, re_path

from runs.api import futures, nowhere, sampling, service, training, training_runs, weights
from runs.api.decorators import Endpoint, endpoint, open_endpoint, operation_endpoint

_CHECKPOINT = "training_runs/<str:run_id>/checkpoints/<str:kind>/<str:name>"


def _route(pattern: str, app: Endpoint) -> URLPattern:
    """Enter an endpoint; Channels' router calls it as an ASGI application, which Django's types do not know."""
    entered: URLPattern = path(pattern, cast(Any, app))
    return entered


_start_up = [
    _route("client/config", open_endpoint(POST=service.client_config)),
    _route("client/dynamic_config", open_endpoint(POST=service.dynamic_config)),
    _route("auth/token", endpoint(POST=service.auth_token)),
    _route("auth/apikey/me", endpoint(GET=service.own_key)),
    _route("healthz", open_endpoint(GET=service.healthz)),
    _route("get_server_capabilities", endpoint(GET=service.capabilities)),
    _route("create_session", endpoint(POST=service.create_session)),
    _route("session_heartbeat", endpoint(POST=service.session_heartbeat)),
    _route("sessions", endpoint(GET=service.list_sessions)),
    _route("sessions/<str:session_id>", endpoint(GET=service.get_session)),
    _route("sessions/<str:session_id>/finish", endpoint(POST=service.finish_session)),
    _route("telemetry", open_endpoint(POST=service.telemetry, max_body_bytes=service.MAX_TELEMETRY_BYTES)),
]
_training = [
    _route("create_model", endpoint(POST=training.create_model)),
    _route("get_info", endpoint(POST=training.get_info)),
    _route("unload_model", endpoint(POST=training.unload_model)),
    _route("forward", operation_endpoint(training.forward)),
    _route("forward_backward", operation_endpoint(training.forward_backward)),
    _route("optim_step", operation_endpoint(training.optim_step)),
    _route("retrieve_future", endpoint(POST=futures.retrieve_future)),
]
_weights = [
    _route("save_weights", operation_endpoint(weights.save_weights)),
    _route("save_weights_for_sampler", operation_endpoint(weights.save_weights_for_sampler)),
    _route("load_weights", operation_endpoint(weights.load_weights)),
    _route("weights_info", endpoint(POST=weights.weights_info)),
]
_sampling = [
    _route("create_sampling_session", endpoint(POST=sampling.create_sampling_session)),
    _route("asample", endpoint(POST=sampling.asample)),
    _route("samplers/<str:sampler_id>", endpoint(GET=sampling.get_sampler)),
]
_listing = [
    _route("training_runs", endpoint(GET=training_runs.list_training_runs)),
    _route("training_runs/<str:run_id>", endpoint(GET=training_runs.get_training_run)),
    _route("training_runs/<str:run_id>/checkpoints", endpoint(GET=training_runs.list_run_checkpoints)),
    _route(_CHECKPOINT, endpoint(DELETE=training_runs.delete_checkpoint)),
    _route(f"{_CHECKPOINT}/archive", endpoint(GET=training_runs.archive)),
    _route("archives/<str:token>", open_endpoint(GET=training_runs.signed_archive)),
    _route(f"{_CHECKPOINT}/publish", endpoint(POST=training_runs.publish, DELETE=training_runs.unpublish)),
    _route(f"{_CHECKPOINT}/ttl", endpoint(PUT=training_runs.set_ttl)),
    _route("checkpoints", endpoint(GET=training_runs.list_checkpoints)),
]
_nowhere = endpoint(**dict.fromkeys(("GET", "POST", "PUT", "DELETE"), nowhere.no_endpoint))
_rest = [re_path("(?s:(?P<address>.*))", cast(Any, _nowhere))]

routes: list[URLPattern] = _start_up + _training + _weights + _sampling + _listing + _rest
