"""Start-up, sessions and capabilities."""

from __future__ import annotations

import pytest

from runs.models import Session, TrainingRun
from tests.api import bodies
from tests.api.client import Actor, error_of, send
from tests.services import rows


async def test_the_config_is_open_and_asks_for_tokens() -> None:
    reply = await send("POST", "/api/v1/client/config", {"sdk_version": "0.22.0"})
    assert reply.status_code == 200
    assert reply.json()["pjwt_auth_enabled"] is True
    assert reply.json()["use_pyqwest_transport"] is False


async def test_the_dynamic_config_and_health_are_open() -> None:
    dynamic = await send("POST", "/api/v1/client/dynamic_config", {"sdk_version": "0.38.0"})
    assert dynamic.json() == {"refresh_interval_sec": 300, "sample_cancel_enabled": False}
    assert (await send("GET", "/api/v1/healthz")).json() == {"status": "ok"}


async def test_telemetry_is_accepted_from_anyone_and_forgotten() -> None:
    body = {"events": [{"event": "SESSION_START"}], "session_id": "sessionless-1"}
    assert (await send("POST", "/api/v1/telemetry", body)).json() == {"status": "accepted"}


async def test_capabilities_name_the_base_models(alice: Actor) -> None:
    reply = await alice.get("get_server_capabilities")
    assert reply.json()["supported_models"] == [
        {
            "model_name": rows.BASE_MODEL,
            "max_context_length": rows.MAX_CONTEXT,
            "trainable": True,
            "sampleable": True,
        }
    ]


async def test_the_owner_of_a_key_is_told(alice: Actor) -> None:
    content = (await alice.get("auth/apikey/me")).json()
    assert content["name"] == alice.user.username
    assert isinstance(content["key_id"], int)
    assert content["details"]["user_details"]["email"]
    assert content["details"]["org_details"]["name"]


async def test_a_session_is_opened_with_what_the_client_says(alice: Actor) -> None:
    body = {
        "tags": ["a", "b"],
        "user_metadata": {"k": 1},
        "sdk_version": "0.38.0",
        "display_name": "Näme",
        "type": "create_session",
    }
    content = (await alice.post("create_session", body)).json()
    assert content["type"] == "create_session"
    session = await Session.objects.aget(public_id=content["session_id"])
    assert (session.owner_id, session.tags, session.user_metadata) == (alice.user.pk, ["a", "b"], {"k": "1"})
    assert (session.sdk_version, session.display_name) == ("0.38.0", "Näme")
    assert not set("/:") & set(session.public_id)


async def test_a_very_long_version_is_no_server_error(alice: Actor) -> None:
    assert (await alice.post("create_session", {"sdk_version": "9" * 100})).status_code == 200


async def test_a_heartbeat_is_noted(alice: Actor, session: Session) -> None:
    reply = await alice.post(
        "session_heartbeat", {"session_id": session.public_id, "type": "session_heartbeat"}
    )
    assert reply.json() == {"type": "session_heartbeat"}
    before = session.last_heartbeat_at
    await session.arefresh_from_db()
    assert session.last_heartbeat_at > before


async def test_a_finished_session_takes_no_heartbeat_and_no_new_run(alice: Actor, session: Session) -> None:
    path = f"sessions/{session.public_id}/finish"
    for reason in ("success", "errored"):
        reply = await alice.post(path, {"reason": {"type": reason}, "detail": None})
        assert (reply.status_code, reply.content) == (204, b"")
    await session.arefresh_from_db()
    assert session.finish_reason == "success"
    error_of(await alice.post("session_heartbeat", {"session_id": session.public_id}), 410)
    error_of(await alice.post("create_model", bodies.create_model(session.public_id)), 410)
    assert not await TrainingRun.objects.filter(session=session).aexists()


async def test_an_unknown_reason_is_refused(alice: Actor, session: Session) -> None:
    reply = await alice.post(f"sessions/{session.public_id}/finish", {"reason": {"type": "bored"}})
    assert error_of(reply, 422)["place"] == "reason.type"


async def test_sessions_that_made_something_are_listed(alice: Actor, bob: Actor, run: TrainingRun) -> None:
    await alice.post("create_session", {})
    session = await Session.objects.aget(training_runs=run)
    assert (await alice.get("sessions?limit=20&offset=0&access_scope=owned")).json() == {
        "sessions": [session.public_id]
    }
    assert (await bob.get("sessions")).json() == {"sessions": []}


async def test_a_session_lists_what_it_made(alice: Actor, session: Session) -> None:
    run_id = (await alice.post("create_model", bodies.create_model(session.public_id))).json()["model_id"]
    body = {"session_id": session.public_id, "sampling_session_seq_id": 3, "base_model": rows.BASE_MODEL}
    sampler_id = (await alice.post("create_sampling_session", body)).json()["sampling_session_id"]
    content = (await alice.get(f"sessions/{session.public_id}?access_scope=owned")).json()
    assert content == {
        "training_run_ids": [run_id],
        "sampler_ids": [sampler_id],
        "user_metadata": {},
        "display_name": None,
    }


@pytest.mark.parametrize("path", ["nothing", "training_runs/a/b", "sessions/", "", "checkpoints/upload"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
async def test_an_unknown_path_is_404_in_json(alice: Actor, path: str, method: str) -> None:
    assert error_of(await alice.request(method, path), 404)["detail"] == "there is no such endpoint"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "create_model"),
        ("PATCH", "training_runs"),
        ("DELETE", "checkpoints"),
        ("PUT", "healthz"),
        ("OPTIONS", "x"),
    ],
)
async def test_a_wrong_method_is_405_in_json(alice: Actor, method: str, path: str) -> None:
    reply = await alice.request(method, path)
    assert reply.status_code == 405
    assert reply.headers["content-type"] == "application/json"
    assert "use " in reply.json()["detail"]
