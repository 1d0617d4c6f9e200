"""The page of workers: what it says of each, and who may drain one."""

from __future__ import annotations

import pytest
from django.test import Client

from runs.models import TrainingRun, User, Worker
from runs.services import workers
from tests.pages import seed

pytestmark = pytest.mark.django_db
MODEL = seed.MODEL


@pytest.fixture
def operator(alice: User) -> User:
    User.objects.filter(pk=alice.pk).update(is_staff=True)
    return alice


def serving() -> Worker:
    worker = seed.make_worker()
    Worker.objects.filter(pk=worker.pk).update(fingerprint={MODEL: {"torch": "2"}})
    return worker


def text_of(page: Client) -> str:
    return " ".join(page.get("/workers/?part").content.decode().split())


def test_only_an_operator_sees_the_buttons(page: Client, alice: User) -> None:
    seed.make_worker()
    assert "Drain" not in text_of(page)
    User.objects.filter(pk=alice.pk).update(is_staff=True)
    assert "Drain this worker?" in text_of(page)


def test_the_question_says_what_becomes_of_the_runs(page: Client, operator: User) -> None:
    worker = serving()
    for _ in range(2):
        TrainingRun.objects.filter(pk=seed.make_run(operator).pk).update(worker=worker)
    text = text_of(page)
    assert "lets its 2 runs go" in text
    assert f"No other worker takes runs of {MODEL}. They wait" in text
    other = serving()
    assert "Other workers take the runs over within seconds" in text_of(page)
    Worker.objects.filter(pk=other.pk).update(drain_asked_at=other.started_at)
    assert f"No other worker takes runs of {MODEL}. They wait" in text_of(page)


def test_an_operator_drains_and_resumes_without_javascript(page: Client, operator: User) -> None:
    worker = serving()
    reply = page.post(f"/workers/{worker.pk}/drain", follow=True)
    text = " ".join(reply.content.decode().split())
    assert f"Worker {worker} takes nothing new and lets its runs go." in text
    assert '<span class="status status-warn">drained</span>' in text
    assert f"No worker takes runs or samples of {MODEL}: those that have it are drained." in text
    assert "What is sent is kept." in text
    run = seed.make_run(operator)
    seed.add_operations(run, num_done=0)
    for address in ("/workers/", "/runs/"):
        shown = " ".join(page.get(address).content.decode().split())
        assert "1 run waits; nothing is lost." in shown
    reply = page.post(f"/workers/{worker.pk}/resume", follow=True)
    text = reply.content.decode()
    assert f"Worker {worker} takes runs again." in text
    assert '<span class="status status-good">alive</span>' in text
    assert "are drained" not in text


def test_it_says_who_draws_the_samples(page: Client, alice: User) -> None:
    worker = serving()
    words = "samples by the engine: the vLLM server at gpu1:8100 does not answer (ConnectError)"
    assert workers.renew(worker, busy_share=0.0, samplers={MODEL: words})
    assert f"{MODEL}: {words}" in text_of(page)
    assert workers.renew(worker, busy_share=0.0)
    assert "samples by" not in text_of(page)


def test_a_worker_that_has_ended_is_not_drained(page: Client, operator: User) -> None:
    worker = seed.make_worker(is_alive=False)
    reply = page.post(f"/workers/{worker.pk}/drain", headers={"accept": "application/json"})
    assert reply.status_code == 422
    assert reply.json()["detail"].endswith("has ended; only one that is alive is drained or resumed")
    assert page.post(f"/workers/{worker.pk + 1}/drain").status_code == 404
    assert page.post(f"/workers/{10**30}/drain").status_code == 404
    assert "popovertarget" not in text_of(page)


def test_who_is_no_operator_drains_nothing(page: Client, alice: User) -> None:
    worker = serving()
    for verb in ("drain", "resume"):
        assert page.post(f"/workers/{worker.pk}/{verb}").status_code == 403
    worker.refresh_from_db()
    assert worker.drain_asked_at is None
