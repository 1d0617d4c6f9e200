"""Deleting a run from its page: what the dialog says, what happens, and who may."""

from __future__ import annotations

import pytest
from django.test import Client

from runs.models import Checkpoint, Operation, TrainingRun, User
from tests.pages import recipe_seed, seed

pytestmark = pytest.mark.django_db


@pytest.fixture
def rested(run: TrainingRun) -> TrainingRun:
    Operation.objects.filter(run=run, state="queued").delete()
    return run


def test_the_dialog_says_what_goes(page: Client, rested: TrainingRun) -> None:
    for name in ("step-000010", "step-000020"):
        seed.add_checkpoint(rested, name)
    text = page.get(f"/runs/{rested.public_id}/").content.decode()
    assert (
        "Its 2 checkpoints (84.0 MB), charts, samples, operations and settings are deleted for good" in text
    )
    assert "Delete run" in text


def test_the_dialog_counts_what_no_table_shows(page: Client, rested: TrainingRun) -> None:
    shown = seed.add_checkpoint(rested, "step-000010")
    shared = {"owner": rested.owner, "run": rested, "kind": "weights", "step": 1, "seq": 1}
    Checkpoint.objects.bulk_create(
        Checkpoint(**shared, name=f"many-{n}", directory=f"many/{n}", size_bytes=10**6) for n in range(500)
    )
    Checkpoint.objects.create(
        **shared, name="sampled", directory="sampled", size_bytes=10**9 - shown.size_bytes, is_ephemeral=True
    )
    text = page.get(f"/runs/{rested.public_id}/").content.decode()
    assert "Its 502 checkpoints (1.5 GB), charts" in text


def test_the_run_is_gone_and_the_list_says_so(page: Client, rested: TrainingRun) -> None:
    reply = page.post(f"/runs/{rested.public_id}/delete", follow=True)
    assert reply.redirect_chain == [("/runs/", 302)]
    assert "The run alice&#x27;s run was deleted." in reply.content.decode()
    assert not TrainingRun.objects.exists()
    assert page.get(f"/runs/{rested.public_id}/").status_code == 404


def test_a_run_with_work_is_kept_and_the_page_says_why(page: Client, run: TrainingRun) -> None:
    queued = Operation.objects.filter(run=run).first()
    assert queued is not None
    Operation.objects.filter(pk=queued.pk).update(state="queued")
    Operation.objects.filter(run=run).exclude(pk=queued.pk).exclude(state="done").delete()
    address = f"/runs/{run.public_id}/"
    assert "mintweb cannot delete a run with 1 unfinished operation" in page.get(address).content.decode()
    reply = page.post(f"{address}delete", follow=True)
    assert reply.redirect_chain == [(address, 302)]
    assert "Cannot delete a run with 1 unfinished operation; stop its client" in reply.content.decode()
    assert TrainingRun.objects.filter(pk=run.pk).exists()


@pytest.mark.parametrize("state", ["failed", "discarding", "stopping"])
def test_a_run_that_no_worker_comes_for_is_deleted_though_operations_wait(
    page: Client, alice: User, state: str
) -> None:
    run = seed.make_run(alice, name="never loaded", source="browser")
    Operation.objects.create(owner=alice, run=run, seq=0, kind="create_model", state="queued")
    recipe_seed.make_recipe(run, state=state, started_at=None)
    text = page.get(f"/runs/{run.public_id}/").content.decode()
    assert "Delete run" in text
    assert "cannot delete" not in text
    text = page.post(f"/runs/{run.public_id}/delete", follow=True).content.decode()
    assert "The run never loaded was deleted." in text
    assert not TrainingRun.objects.exists()


def test_it_is_nobody_elses_to_delete(client: Client, bob: User, rested: TrainingRun) -> None:
    client.force_login(bob)
    assert client.post(f"/runs/{rested.public_id}/delete").status_code == 404
    assert client.get(f"/runs/{rested.public_id}/delete").status_code in (404, 405)
    assert TrainingRun.objects.filter(pk=rested.pk).exists()


def test_several_are_deleted_from_the_list_and_those_at_work_are_kept(
    page: Client, run: TrainingRun, alice: User
) -> None:
    idle = [seed.make_run(alice, name=f"idle {number}") for number in range(2)]
    assert Operation.objects.filter(run=run, state="queued").exists()
    reply = page.post("/runs/delete", {"run": [one.public_id for one in (*idle, run)]}, follow=True)
    text = reply.content.decode()
    assert "2 runs were deleted." in text
    assert "alice&#x27;s run was kept: cannot delete a run with 2 unfinished operations" in text
    assert list(TrainingRun.objects.all()) == [run]


def test_one_that_is_not_mine_is_as_good_as_gone(page: Client, alice: User, bob: User) -> None:
    mine, gone, foreign = seed.make_run(alice), seed.make_run(alice), seed.make_run(bob)
    chosen = [one.public_id for one in (mine, gone, foreign)]
    gone.delete()
    text = page.post("/runs/delete", {"run": chosen}, follow=True).content.decode()
    assert "1 run was deleted." in text
    assert "2 were not there any more." in text
    assert list(TrainingRun.objects.all()) == [foreign]


def test_as_many_are_deleted_as_a_live_list_holds(page: Client, alice: User) -> None:
    chosen = [seed.make_run(alice).public_id for _ in range(60)]
    assert "60 runs were deleted." in page.post("/runs/delete", {"run": chosen}, follow=True).content.decode()


@pytest.mark.parametrize(
    ("form", "address"),
    [
        ({"q": "idle & fox?", "status": "failed"}, "/runs/?q=idle+%26+fox%3F&status=failed"),
        ({"after": "abc:def", "q": ""}, "/runs/?after=abc%3Adef"),
        (
            {"next": "//evil.example", "q": "//evil.example\r\nx: y"},
            "/runs/?q=%2F%2Fevil.example%0D%0Ax%3A+y",
        ),
        ({"q": "x" * 5000}, f"/runs/?q={'x' * 200}"),
    ],
)
def test_the_list_comes_back_as_it_was_searched(page: Client, form: dict[str, str], address: str) -> None:
    assert page.post("/runs/delete", form).headers["location"] == address


def test_a_searched_list_sends_its_search_along(page: Client, alice: User) -> None:
    seed.make_run(alice, name='a "quoted" run', state="failed")
    text = page.get("/runs/?q=%22quoted%22&status=failed&more=x").content.decode()
    assert '<input type="hidden" name="q" value="&quot;quoted&quot;" form="delete-runs">' in text
    assert '<input type="hidden" name="status" value="failed" form="delete-runs">' in text
    assert 'form="delete-runs">' in text
    assert "more" not in "".join(line for line in text.splitlines() if 'form="delete-runs"' in line)
