"""One valid call of every endpoint, made of the ids of what somebody owns."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from runs.api import sdk
from runs.api.decorators import Endpoint
from runs.models import Checkpoint, Operation, SamplingSession, TrainingRun
from tests.api import bodies
from tests.services import rows


@dataclass(frozen=True, kw_only=True)
class Owned:
    """What a user has, as far as ids go."""

    session_id: str
    run: TrainingRun
    sampling_session: SamplingSession
    checkpoint_name: str
    request_id: str

    @property
    def path(self) -> str:
        """The checkpoint's path."""
        return f"tinker://{self.run.public_id}/weights/{self.checkpoint_name}"

    @property
    def ids(self) -> list[str]:
        """The ids that may appear in an answer, longest first."""
        return [self.run.public_id, self.sampling_session.public_id, self.session_id, self.request_id]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request; `names` tells whether it names something that somebody owns."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    names: bool = True


def owned_by(run: TrainingRun, checkpoint: Checkpoint, sampling_session: SamplingSession) -> Owned:
    """Return the ids of real rows."""
    return Owned(
        session_id=run.session.public_id,
        run=run,
        sampling_session=sampling_session,
        checkpoint_name=checkpoint.name,
        request_id=f"op-{Operation.objects.filter(run=run).earliest('pk').pk}",
    )


def nobodys() -> Owned:
    """Return ids that look right and name nothing."""
    session_id = str(uuid.uuid4())
    return Owned(
        session_id=session_id,
        run=TrainingRun(public_id=f"{session_id}:train:0"),
        sampling_session=SamplingSession(public_id=f"{session_id}:sample:0"),
        checkpoint_name="one",
        request_id="op-987654321987",
    )


def calls(owned: Owned) -> list[Call]:
    """Return the calls: reads and submits first, then what changes or ends something."""
    run, session_id = owned.run, owned.session_id
    checkpoint = f"training_runs/{run.public_id}/checkpoints/weights/{owned.checkpoint_name}"
    sampler = {"session_id": session_id, "sampling_session_seq_id": 7, "base_model": rows.BASE_MODEL}

    def post(path: str, body: dict[str, Any] | None = None, *, names: bool = True) -> Call:
        return Call(method="POST", path=path, body=body or {}, names=names)

    def get(path: str, *, names: bool = True) -> Call:
        return Call(method="GET", path=path, names=names)

    return [
        post("client/config", names=False),
        post("client/dynamic_config", names=False),
        post("telemetry", {"events": []}, names=False),
        get("healthz", names=False),
        get("archives/1:unsigned:token", names=False),
        post("auth/token", names=False),
        get("auth/apikey/me", names=False),
        get("get_server_capabilities", names=False),
        get("sessions", names=False),
        get("training_runs", names=False),
        get("checkpoints", names=False),
        post("create_session", names=False),
        post("session_heartbeat", {"session_id": session_id}),
        get(f"sessions/{session_id}"),
        post("create_model", bodies.create_model(session_id, 7)),
        post("get_info", {"model_id": run.public_id}),
        post("forward", bodies.forward(run, 11)),
        post("forward_backward", bodies.forward_backward(run, 12)),
        post("optim_step", bodies.optim_step(run, 13)),
        post("retrieve_future", {"request_id": owned.request_id}),
        post("save_weights", bodies.save_weights(run, 14)),
        post("save_weights_for_sampler", bodies.save_for_sampler(run, 15, path="s")),
        post("load_weights", bodies.load_weights(run, 16, owned.path)),
        post("weights_info", {"tinker_path": owned.path}),
        post("create_sampling_session", sampler),
        post("asample", bodies.sample(owned.sampling_session)),
        get(f"samplers/{owned.sampling_session.public_id}"),
        get(f"training_runs/{run.public_id}"),
        get(f"training_runs/{run.public_id}/checkpoints"),
        get(f"{checkpoint}/archive"),
        post(f"{checkpoint}/publish"),
        Call(method="DELETE", path=f"{checkpoint}/publish"),
        Call(method="PUT", path=f"{checkpoint}/ttl", body={"ttl_seconds": 3600}),
        Call(method="DELETE", path=checkpoint),
        post("unload_model", {"model_id": run.public_id}),
        post(f"sessions/{session_id}/finish", {"reason": {"type": "success"}}),
    ]


def endpoints() -> Iterator[tuple[str, str, Endpoint]]:
    """Yield (method, route, endpoint) of everything the SDK API answers."""
    for route in sdk.routes:
        app = cast(Endpoint, route.callback)
        for method in app.views:
            yield method, str(route.pattern), app
