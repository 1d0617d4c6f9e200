"""Checkpoints: the list, the archive, keeping and deleting."""

from __future__ import annotations

import io
import tarfile

import pytest
from django.core.files.storage import default_storage
from django.test import Client

from runs.models import Checkpoint, TrainingRun
from tests.pages import seed
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


def test_the_archive_holds_the_adapter_and_not_the_optimizer(page: Client, checkpoint: Checkpoint) -> None:
    reply = page.get(address(checkpoint, "download"))
    assert reply["content-type"] == "application/x-tar"
    assert reply["content-disposition"].startswith("attachment;")
    with tarfile.open(fileobj=io.BytesIO(streamed(reply))) as archive:
        assert archive.getnames() == ["adapter_config.json", "adapter_model.safetensors"]
        member = archive.extractfile("adapter_model.safetensors")
        assert member is not None
        assert member.read() == bytes(range(256)) * 40


def test_deleting_removes_row_and_files(page: Client, checkpoint: Checkpoint) -> None:
    reply = page.post(address(checkpoint, "delete"), {"next": f"/runs/{checkpoint.run.public_id}/"})
    assert reply["location"] == f"/runs/{checkpoint.run.public_id}/"
    assert not Checkpoint.objects.exists()
    assert not default_storage.exists(f"{checkpoint.directory}/adapter_model.safetensors")


def test_it_goes_back_to_our_own_pages_only(page: Client, checkpoint: Checkpoint) -> None:
    reply = page.post(address(checkpoint, "delete"), {"next": "//evil.example/"})
    assert reply["location"] == "/checkpoints/"


def test_several_are_deleted_together_or_none(page: Client, checkpoint: Checkpoint, run: TrainingRun) -> None:
    other = seed.add_checkpoint(run, "other")
    path = f"tinker://{run.public_id}/weights/"
    reply = page.post("/checkpoints/delete", {"path": [f"{path}{checkpoint.name}", f"{path}missing"]})
    assert reply.status_code == 404
    assert Checkpoint.objects.count() == 2
    page.post("/checkpoints/delete", {"path": [f"{path}{checkpoint.name}", f"{path}{other.name}"]})
    assert not Checkpoint.objects.exists()


def test_its_time_can_be_changed(page: Client, checkpoint: Checkpoint) -> None:
    page.post(address(checkpoint, "keep"), {"seconds": "0"})
    assert Checkpoint.objects.get().expires_at is None
    page.post(address(checkpoint, "keep"), {"seconds": "86400"})
    assert Checkpoint.objects.get().expires_at is not None
    assert page.post(address(checkpoint, "keep"), {"seconds": "7"}).status_code == 422


def test_an_unknown_kind_is_missing(page: Client, checkpoint: Checkpoint) -> None:
    assert page.get(address(checkpoint, "download").replace("/weights/", "/secrets/")).status_code == 404
