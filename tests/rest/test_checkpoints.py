"""Checkpoints: listed, downloaded as PEFT reads them, kept or published, deleted alone or in bulk."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from typing import Any

import pytest
from django.core.files.storage import default_storage
from pytest_django import DjangoCaptureOnCommitCallbacks

from runs.models import Checkpoint, TrainingRun
from tests.pages import seed
from tests.rest.client import Rest


@pytest.fixture
def checkpoint(run: TrainingRun) -> Checkpoint:
    """Return a training checkpoint of alice's run."""
    return seed.add_checkpoint(run, "step-000010", step=10)


def address(checkpoint: Checkpoint, rest: str = "") -> str:
    return f"runs/{checkpoint.run.public_id}/checkpoints/{checkpoint.kind}/{checkpoint.name}{rest}"


def path_of(checkpoint: Checkpoint) -> str:
    return f"tinker://{checkpoint.run.public_id}/{checkpoint.kind}/{checkpoint.name}"


def test_a_checkpoint_is_shown(alice: Rest, checkpoint: Checkpoint) -> None:
    shown = alice.get(address(checkpoint))
    assert (shown["path"], shown["step"], shown["kind"]) == (path_of(checkpoint), 10, "weights")
    assert (shown["expires_at"], shown["is_public"]) == (None, False)
    assert alice.get("checkpoints")["items"] == [shown]
    assert alice.get(f"runs/{checkpoint.run.public_id}/checkpoints")["items"] == [shown]
    alice.refused("GET", address(checkpoint).replace("/weights/", "/secrets/"), status=404)


def test_checkpoints_are_sorted_and_filtered(alice: Rest, run: TrainingRun) -> None:
    for step in (20, 10, 30):
        seed.add_checkpoint(run, f"step-{step:06d}", step=step)
    seed.add_checkpoint(run, "for-sampling", kind="sampler_weights", step=5)
    other = seed.make_run(alice.user)
    seed.add_checkpoint(other, "elsewhere", step=1)
    steps = [one["step"] for one in alice.walk(f"runs/{run.public_id}/checkpoints?sort=step&limit=2")]
    assert steps == [5, 10, 20, 30]
    assert len(list(alice.walk("checkpoints?limit=2"))) == 5
    (only,) = alice.get("checkpoints?kind=sampler_weights")["items"]
    assert only["name"] == "for-sampling"


def test_weights_that_a_page_saved_for_itself_are_not_listed(alice: Rest, checkpoint: Checkpoint) -> None:
    Checkpoint.objects.filter(pk=checkpoint.pk).update(is_ephemeral=True)
    assert alice.get("checkpoints")["items"] == []
    alice.refused("GET", address(checkpoint), status=404)


@pytest.mark.parametrize("format", ["tar", "zip"])
def test_the_archive_holds_the_adapter_and_not_the_optimizer(
    alice: Rest, checkpoint: Checkpoint, format: str
) -> None:
    content, headers = alice.download(address(checkpoint, f"/download?format={format}"))
    name = f"{checkpoint.run.public_id[:8]}-0-step-000010.{format}"
    assert headers["content-disposition"] == f'attachment; filename="{name}"'
    if format == "tar":
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            files = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    else:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert archive.testzip() is None
            files = {name: archive.read(name) for name in archive.namelist()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"]) == {"r": 16}
    assert files["adapter_model.safetensors"] == bytes(range(256)) * 40


def test_a_checkpoint_is_kept_for_a_time_and_published(alice: Rest, checkpoint: Checkpoint) -> None:
    tag = alice.send("GET", address(checkpoint)).headers["etag"]
    shown = alice.done("PATCH", address(checkpoint), {"ttl_seconds": 3600}, if_match=tag)
    assert shown["expires_at"] is not None
    assert alice.refused("PATCH", address(checkpoint), {}, status=412, if_match=tag)["place"] == "If-Match"
    shown = alice.done("PATCH", address(checkpoint), {"ttl_seconds": None, "is_public": True})
    assert (shown["expires_at"], shown["is_public"]) == (None, True)
    assert alice.done("PATCH", address(checkpoint), {})["is_public"] is True
    assert alice.refused("PATCH", address(checkpoint), {"ttl_seconds": 1})["place"] == "ttl_seconds"


def test_what_is_published_is_still_not_anybodys_to_change(
    alice: Rest, bob: Rest, checkpoint: Checkpoint
) -> None:
    alice.done("PATCH", address(checkpoint), {"is_public": True})
    bob.refused("PATCH", address(checkpoint), {"is_public": False}, status=404)
    bob.refused("DELETE", address(checkpoint), status=404)
    bob.refused("POST", "checkpoints/delete", {"paths": [path_of(checkpoint)]}, status=404)
    assert Checkpoint.objects.filter(pk=checkpoint.pk, is_public=True).exists()


def test_a_checkpoint_is_deleted_with_its_files(
    alice: Rest,
    checkpoint: Checkpoint,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        alice.done("DELETE", address(checkpoint), status=204)
    assert not default_storage.exists(f"{checkpoint.directory}/adapter_model.safetensors")
    alice.refused("DELETE", address(checkpoint), status=404)


def test_many_are_deleted_or_none(alice: Rest, run: TrainingRun) -> None:
    made = [seed.add_checkpoint(run, f"step-{step}") for step in range(5)]
    paths = [path_of(one) for one in made]
    alice.refused("POST", "checkpoints/delete", {"paths": [*paths, f"{paths[0]}x"]}, status=404)
    error = alice.refused("POST", "checkpoints/delete", {"paths": [*paths, "step-1"]})
    assert error["place"] == "paths[5]"
    assert Checkpoint.objects.count() == 5
    reply = alice.post("checkpoints/delete", {"paths": [*paths[:4], paths[0]]}, status=200)
    assert reply == {"num_deleted": 4}
    assert [one["name"] for one in alice.get("checkpoints")["items"]] == ["step-4"]
    assert alice.refused("POST", "checkpoints/delete", {"paths": []})["place"] == "paths"


@pytest.mark.parametrize("headers", [{}, {"idempotency_key": "a"}])
@pytest.mark.django_db(transaction=True)
def test_only_files_that_a_fork_has_still_to_load_stay(
    transactional_db: None, headers: dict[str, Any]
) -> None:
    alice = Rest.make("alice")
    run = seed.make_run(alice.user)
    made = [seed.add_checkpoint(run, f"step-{step}") for step in range(3)]
    seed.make_fork(alice.user, made[2])
    body = {"paths": [path_of(one) for one in made]}
    for _ in range(2 if headers else 1):
        assert alice.post("checkpoints/delete", body, status=200, **headers) == {"num_deleted": 3}
    assert alice.get("checkpoints")["items"] == []
    assert [default_storage.exists(one.directory) for one in made] == [False, False, True]
