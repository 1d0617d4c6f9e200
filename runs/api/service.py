"""Start-up, sessions and what the server can do."""

from __future__ import annotations

from typing import Final

from runs.api.decorators import NO_CONTENT, ApiRequest, Reply, json_reply
from runs.schemas import requests
from runs.schemas.parsing import validate
from runs.services import access, base_models, keys, sessions

# A client sends 100 events at a time, some with a traceback.
MAX_TELEMETRY_BYTES: Final = 1 << 20
CLIENT_CONFIG = {
    "pjwt_auth_enabled": True,
    "use_pyqwest_transport": False,
    "proto_compress_fwdbwd": False,
    "parallel_fwdbwd_chunks": False,
}


def client_config(request: ApiRequest) -> Reply:
    """Tell the client how to talk.

    Tokens instead of long-lived keys, no transport that hides redirects, and the parts of a large batch in their
    order: else the first one comes last, and is missed when it has to be sent again for long.
    """
    return json_reply(CLIENT_CONFIG)


def dynamic_config(request: ApiRequest) -> Reply:
    """Tell a newer client what it may change its mind about: nothing yet."""
    return json_reply({"refresh_interval_sec": 300, "sample_cancel_enabled": False})


def auth_token(request: ApiRequest) -> Reply:
    """Exchange the key for a token."""
    return json_reply({"jwt": keys.issue_token(request.credential)})


def own_key(request: ApiRequest) -> Reply:
    """Say whose key this is."""
    user = request.user
    details = {"org_details": {"name": "mintweb"}, "user_details": {"email": user.email or user.username}}
    return json_reply({"key_id": 0, "name": user.username, "note": "", "details": details})


def healthz(request: ApiRequest) -> Reply:
    """Answer while the web process runs."""
    return json_reply({"status": "ok"})


def capabilities(request: ApiRequest) -> Reply:
    """List the base models that can be trained and sampled from."""
    models = [
        {
            "model_name": info.name,
            "max_context_length": info.max_context or None,
            "trainable": True,
            "sampleable": True,
        }
        for info in base_models.available()
        if not info.error
    ]
    return json_reply({"supported_models": models})


def create_session(request: ApiRequest) -> Reply:
    """Open a session."""
    body = validate(requests.CreateSession, request.body)
    session = sessions.create_session(
        request.user,
        tags=body.tags,
        user_metadata=body.user_metadata,
        sdk_version=body.sdk_version,
        display_name=body.display_name or "",
    )
    return json_reply({"type": "create_session", "session_id": session.public_id})


def session_heartbeat(request: ApiRequest) -> Reply:
    """Note that the client is alive; 410 tells it that the session is finished."""
    body = validate(requests.SessionHeartbeat, request.body)
    sessions.heartbeat(access.get_open_session(request.user, body.session_id))
    return json_reply({"type": "session_heartbeat"})


def finish_session(request: ApiRequest) -> Reply:
    """Close a session."""
    body = validate(requests.FinishSession, request.body)
    sessions.finish(access.get_session(request.user, request.path_args["session_id"]), body.reason.type)
    return NO_CONTENT


def telemetry(request: ApiRequest) -> Reply:
    """Accept and discard: the events may hold tracebacks and keys."""
    return json_reply({"status": "accepted"})


def list_sessions(request: ApiRequest) -> Reply:
    """List the user's sessions that made something."""
    offset, limit = request.page(default_limit=20)
    rows = access.sessions_of(request.user)[offset : offset + limit]
    return json_reply({"sessions": [session.public_id for session in rows]})


def get_session(request: ApiRequest) -> Reply:
    """Return the runs and sampling sessions of a session."""
    session = access.get_session(request.user, request.path_args["session_id"])
    return json_reply(
        {
            "training_run_ids": list(session.training_runs.values_list("public_id", flat=True)),
            "sampler_ids": list(session.sampling_sessions.values_list("public_id", flat=True)),
            "user_metadata": session.user_metadata,
            "display_name": session.display_name or None,
        }
    )
