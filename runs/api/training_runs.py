"""Listing and managing runs and checkpoints, as the SDK's REST client and the tinker CLI do it."""

from __future__ import annotations

from typing import Any

from runs import ids
from runs.api.decorators import NO_CONTENT, ApiRequest, Reply, json_reply
from runs.exceptions import NotFound
from runs.models import Checkpoint, TrainingRun, User
from runs.schemas import requests
from runs.schemas.parsing import validate
from runs.services import access, archives, checkpoints, sampling, tallies, training_runs
from runs.services.tallies import Total
from runs.services.training_runs import Latest


def list_training_runs(request: ApiRequest) -> Reply:
    """List the user's runs, newest first."""
    offset, limit = request.page(default_limit=20)
    rows = list(access.runs_of(request.user).select_related("owner")[offset : offset + limit])
    latest = training_runs.latest_of(rows)
    return json_reply(
        {
            "training_runs": [_run(run, latest[run.pk]) for run in rows if run.pk in latest],
            "cursor": _cursor(offset, limit, tallies.total_of(request.user, tallies.Kind.RUNS)),
        }
    )


def get_training_run(request: ApiRequest) -> Reply:
    """Return one run."""
    run = access.get_run(request.user, request.path_args["run_id"])
    latest = training_runs.latest_of([run]).get(run.pk)
    if latest is None:
        raise NotFound("the run was deleted just now")
    return json_reply(_run(run, latest))


def list_run_checkpoints(request: ApiRequest) -> Reply:
    """List a run's checkpoints, newest first; there is a cursor when the page does not hold them all."""
    offset, limit = request.page(default_limit=1000)
    run = access.get_run(request.user, request.path_args["run_id"])
    rows = access.checkpoints_of(request.user).filter(run=run)
    page = list(rows[offset : offset + limit + 1])
    cursor = None
    if offset or len(page) > limit:
        cursor = {"offset": offset, "limit": limit, "total_count": rows.count()}
    return json_reply({"checkpoints": [_checkpoint(row) for row in page[:limit]], "cursor": cursor})


def list_checkpoints(request: ApiRequest) -> Reply:
    """List all of the user's checkpoints, newest first."""
    offset, limit = request.page(default_limit=100)
    rows = access.checkpoints_of(request.user)
    return json_reply(
        {
            "checkpoints": [_checkpoint(row) for row in rows[offset : offset + limit]],
            "cursor": _cursor(offset, limit, tallies.total_of(request.user, tallies.Kind.CHECKPOINTS)),
        }
    )


def delete_checkpoint(request: ApiRequest) -> Reply:
    """Delete a checkpoint and its files."""
    checkpoints.delete(_own_checkpoint(request))
    return NO_CONTENT


def publish(request: ApiRequest) -> Reply:
    """Let every user of this server read a checkpoint."""
    checkpoints.set_public(_own_checkpoint(request), is_public=True)
    return NO_CONTENT


def unpublish(request: ApiRequest) -> Reply:
    """Take a checkpoint back."""
    checkpoints.set_public(_own_checkpoint(request), is_public=False)
    return NO_CONTENT


def set_ttl(request: ApiRequest) -> Reply:
    """Let a checkpoint end after a time, or never."""
    body = validate(requests.SetTtl, request.body)
    checkpoints.set_ttl(_own_checkpoint(request), body.ttl_seconds)
    return NO_CONTENT


def archive(request: ApiRequest) -> Reply:
    """Redirect to a signed address of the checkpoint as a tar file; the client follows it without its key."""
    checkpoint = _own_checkpoint(request)
    location = f"{request.base_url}/api/v1/archives/{archives.sign(checkpoint)}"
    return Reply(status=302, headers={"location": location})


def signed_archive(request: ApiRequest) -> Reply:
    """Send the tar file that a signed address opens."""
    checkpoint = archives.opened_by(request.path_args["token"])
    return Reply(parts=archives.tar(checkpoint), content_type="application/x-tar")


def _cursor(offset: int, limit: int, total: Total) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total.num}


def _own_checkpoint(request: ApiRequest) -> Checkpoint:
    args = request.path_args
    return access.get_checkpoint(
        request.user, ids.parse_checkpoint_id(args["run_id"], args["kind"], args["name"])
    )


def _run(run: TrainingRun, latest: Latest) -> dict[str, Any]:
    owner: User = run.owner
    return {
        "training_run_id": run.public_id,
        "base_model": run.base_model,
        "model_owner": owner.username,
        "is_lora": True,
        "corrupted": run.state == TrainingRun.State.FAILED,
        "lora_rank": run.lora_rank,
        "last_request_time": latest.asked_at.isoformat(),
        "last_checkpoint": _checkpoint(latest.training) if latest.training else None,
        "last_sampler_checkpoint": _checkpoint(latest.sampler) if latest.sampler else None,
        "user_metadata": run.user_metadata or None,
    }


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    is_training = checkpoint.kind == Checkpoint.Kind.TRAINING
    return {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": "training" if is_training else "sampler",
        "time": checkpoint.created_at.isoformat(),
        "tinker_path": sampling.path_of(checkpoint),
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.is_public,
        "expires_at": checkpoint.expires_at.isoformat() if checkpoint.expires_at else None,
        "user_metadata": checkpoint.user_metadata or None,
    }
