"""Checkpoints: the list, the archive, keeping and deleting."""

from __future__ import annotations

import io
import tarfile
from urllib.parse import quote

import pytest
from django.core.files.storage import default_storage
from django.test import Client
from django.utils import timezone
from pytest_django import DjangoCaptureOnCommitCallbacks

from runs.models import Checkpoint, Metric, TrainingRun
from runs.services import checkpoint_facts
from tests.pages import recipe_seed, seed
from tests.pages.test_run_detail import streamed

pytestmark = pytest.mark.django_db


@pytest.fixture
def checkpoint(run: TrainingRun) -> Checkpoint:
    return seed.add_checkpoint(run, "step-000030", days=7)


def address(checkpoint: Checkpoint, action: str) -> str:
    return f"/runs/{checkpoint.run.public_id}/checkpoints/{checkpoint.kind}/{checkpoint.name}/{action}"


def test_it_lists_them_with_what_they_take(page: Client, checkpoint: Checkpoint) -> None:
    text = page.get("/checkpoints/").content.decode()
    assert "step-000030" in text
    assert "1 take 42.0 MB" in text
    assert "in 7 d" in text


def test_it_shows_the_losses_at_the_step_and_the_best(page: Client, run: TrainingRun) -> None:
    recipe_seed.make_recipe(run, best_step=20)
    for step in (10, 20):
        checkpoint = seed.add_checkpoint(run, f"step-{step:06d}", step=step)
        Checkpoint.objects.filter(pk=checkpoint.pk).update(seq=2 * step)
        Metric.objects.filter(run=run, name="loss", step=step).update(value=step + 0.125)
        Metric.objects.create(run=run, seq=9000 + step, name="validation_loss", step=step, value=step + 0.5)
    for address in ("/checkpoints/", f"/runs/{run.public_id}/"):
        text = page.get(address).content.decode()
        first, second = (
            text.split(f'data-key="tinker://{run.public_id}/weights/step-0000{step}"')[-1]
            for step in (10, 20)
        )
        first, second = first.partition("</tr>")[0], second.partition("</tr>")[0]
        assert "10.12" in first
        assert "10.50" in first
        assert "best" not in first
        assert "20.50" in second
        assert '<span class="badge badge-best">best</span>' in second


@pytest.mark.parametrize(
    ("state", "next_step", "best"),
    [("running", 41, "step-000020"), ("finished", 30, "step-000020"), ("finished", 20, "final")],
)
def test_the_best_is_found_though_a_step_was_skipped(
    run: TrainingRun, state: str, next_step: int, best: str
) -> None:
    """The worker counts no step whose gradient was not finite, the recipe that measures counts it."""
    ended_at = timezone.now() if state == "finished" else None
    recipe_seed.make_recipe(run, best_step=20, state=state, next_step=next_step, ended_at=ended_at)
    names = {
        "step-000010": 9,
        "step-000021": 20,
        "final" if best == "final" else "step-000020": 19,
        "mine": 20,
    }
    for name, step in names.items():
        seed.add_checkpoint(run, name, step=step)
    for step, loss in ((10, 1.5), (20, 0.5), (21, 0.75)):
        Metric.objects.create(run=run, seq=9000 + step, name="validation_loss", step=step, value=loss)
    saved = {checkpoint.name: checkpoint for checkpoint in Checkpoint.objects.filter(run=run)}
    facts = checkpoint_facts.facts_of(saved.values())
    assert [name for name, one in saved.items() if facts[one.pk].is_best] == [best]
    losses = {name: facts[one.pk].validation_loss for name, one in saved.items() if name != "mine"}
    assert losses == {"step-000010": 1.5, "step-000021": 0.75, best: 0.5}


def test_it_leads_to_a_talk_and_a_fork(page: Client, checkpoint: Checkpoint, run: TrainingRun) -> None:
    sampler = seed.add_checkpoint(run, "only", kind="sampler_weights")
    text = page.get("/checkpoints/").content.decode()
    path = quote(f"tinker://{run.public_id}/weights/{checkpoint.name}", safe="")
    assert f"/playground/?checkpoint={path}" in text
    assert f"/runs/new/?fork={path}&amp;optimizer=1" in text
    path = quote(f"tinker://{run.public_id}/sampler_weights/{sampler.name}", safe="")
    assert f"/runs/new/?fork={path}&amp;optimizer=0" in text
    assert page.get(f"/playground/?checkpoint={path}").status_code == 200


def test_it_shows_what_the_disk_holds(page: Client, checkpoint: Checkpoint) -> None:
    text = page.get("/checkpoints/").content.decode()
    assert "of mintweb&#x27;s data" in text or "of mintweb's data" in text
    assert "free" in text


def test_several_can_be_deleted_from_the_runs_page(
    page: Client, checkpoint: Checkpoint, run: TrainingRun
) -> None:
    path = f"tinker://{run.public_id}/weights/{checkpoint.name}"
    reply = page.post("/checkpoints/delete", {"path": [path], "next": f"/runs/{run.public_id}/"})
    assert reply["location"] == f"/runs/{run.public_id}/"
    assert not Checkpoint.objects.exists()


def test_the_archive_holds_the_adapter_and_not_the_optimizer(page: Client, checkpoint: Checkpoint) -> None:
    reply = page.get(address(checkpoint, "download"))
    assert reply["content-type"] == "application/x-tar"
    assert reply["content-disposition"].startswith("attachment;")
    with tarfile.open(fileobj=io.BytesIO(streamed(reply))) as archive:
        assert archive.getnames() == ["adapter_config.json", "adapter_model.safetensors"]
        member = archive.extractfile("adapter_model.safetensors")
        assert member is not None
        assert member.read() == bytes(range(256)) * 40


def test_deleting_removes_row_and_files(
    page: Client,
    checkpoint: Checkpoint,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        reply = page.post(address(checkpoint, "delete"), {"next": f"/runs/{checkpoint.run.public_id}/"})
    assert reply["location"] == f"/runs/{checkpoint.run.public_id}/"
    assert not Checkpoint.objects.exists()
    assert not default_storage.exists(f"{checkpoint.directory}/adapter_model.safetensors")


def test_it_goes_back_to_our_own_pages_only(page: Client, checkpoint: Checkpoint) -> None:
    reply = page.post(address(checkpoint, "delete"), {"next": "//evil.example/"})
    assert reply["location"] == "/checkpoints/"


def test_several_are_deleted_together_though_one_is_gone(
    page: Client, checkpoint: Checkpoint, run: TrainingRun
) -> None:
    other, left = seed.add_checkpoint(run, "other"), seed.add_checkpoint(run, "left")
    names = [checkpoint.name, "missing", other.name]
    chosen = [f"tinker://{run.public_id}/weights/{name}" for name in names]
    text = page.post("/checkpoints/delete", {"path": chosen}, follow=True).content.decode()
    assert "2 checkpoints were deleted." in text
    assert "1 was not there any more." in text
    assert list(Checkpoint.objects.all()) == [left]


def test_its_time_can_be_changed(page: Client, checkpoint: Checkpoint) -> None:
    page.post(address(checkpoint, "keep"), {"seconds": "0"})
    assert Checkpoint.objects.get().expires_at is None
    page.post(address(checkpoint, "keep"), {"seconds": "86400"})
    assert Checkpoint.objects.get().expires_at is not None
    assert page.post(address(checkpoint, "keep"), {"seconds": "7"}).status_code == 422


def test_an_unknown_kind_is_missing(page: Client, checkpoint: Checkpoint) -> None:
    assert page.get(address(checkpoint, "download").replace("/weights/", "/secrets/")).status_code == 404
