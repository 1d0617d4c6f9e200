"""The box that talks to weights, in a real browser: text while it is drawn, and never anything but text."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from django.contrib.sessions.models import Session
from playwright.sync_api import Page, expect

from gpuworker.worker import GpuWorker
from runs.models import Checkpoint, Operation, Recipe, TrainingRun, User
from runs.recipes import rendering
from runs.schemas.requests import from_canonical
from runs.schemas.sampling import StoredSample
from runs.services import commits, sessions, training_runs
from runs.services.commits import Result
from runs.services.training_runs import Lora
from tests.pages import recipe_seed, seed
from tests.pages.live.browser import LIVE
from tests.pages.live.run_page import open_run
from tests.pages.live.server import Server
from tests.pages.live.talking import MODEL, answer, box, say
from tests.worker import conftest as worker_side
from tests.worker.conftest import drawing_no_end, finished, wait_for

pytestmark = LIVE
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\u202e[](javascript:alert(3))"


@pytest.fixture
def worker(transactional_db: None) -> Iterator[GpuWorker]:
    """Return a worker with the shipped model in this process."""
    worker = GpuWorker()
    worker.start()
    yield worker
    worker.stop()


@pytest.fixture
def trained(alice: User, worker: GpuWorker) -> TrainingRun:
    """Return a run with a checkpoint that the worker has saved."""
    session = sessions.create_session(alice)
    run, _ = training_runs.create_run(
        session, model_seq_id=0, base_model=MODEL, lora=Lora(rank=4, seed=1), name="talkative"
    )
    client = worker_side.Client(run)
    client.forward_backward([1, 2, 3, 4, 5, 6])
    client.optim_step(learning_rate=1e-3)
    finished(client.save("step-000001"))
    return run


def test_base_and_tuned_answer_side_by_side(tab: Page, trained: TrainingRun) -> None:
    open_run(tab, trained)
    say(tab, "Tell me a story about a fox.")
    answers = box(tab).locator(".talk-answer")
    expect(answers).to_have_count(2)
    expect(box(tab).locator('.talk-answer[data-state="done"]')).to_have_count(2)
    expect(answers.nth(0).locator(".talk-by")).to_have_text(MODEL)
    expect(answers.nth(1).locator(".talk-by")).to_have_text("step-000001, step 1")
    expect(answers.nth(0).locator(".talk-end")).to_contain_text(re.compile(r"\d+ tokens, [\d.]+ a second"))
    assert len(answers.nth(0).locator(".talk-text").inner_text()) > 20
    expect(box(tab).get_by_role("button", name="Stop")).to_be_hidden()

    say(tab, "And then?")
    expect(box(tab).locator('.talk-answer[data-state="done"]')).to_have_count(4)
    renderer = rendering.renderer_of(MODEL)
    for number, row in enumerate(Operation.objects.filter(kind="sample").order_by("-pk")[:2]):
        asked = from_canonical(StoredSample, bytes(row.payload or b""))
        prompt = renderer.decode(asked.prompt.array(place="prompt").tolist())
        assert "Tell me a story about a fox." in prompt
        assert answers.nth(1 - number).locator(".talk-text").inner_text()[:40].strip() in prompt
    box(tab).get_by_role("button", name="Clear").click()
    expect(answers).to_have_count(0)
    expect(box(tab).get_by_text("Ask something.")).to_be_visible()


def test_stopping_keeps_what_is_there(
    tab: Page,
    trained: TrainingRun,
    worker: GpuWorker,
) -> None:
    open_run(tab, trained)
    box(tab).get_by_text("Settings").click()
    box(tab).get_by_label("Longest answer, tokens").fill("1500")
    box(tab).get_by_label("Temperature").fill("5")
    with drawing_no_end(worker):
        say(tab, "Go on for ever")
        expect(box(tab).locator('.talk-answer[data-state="drawing"]').first).to_be_visible()
        box(tab).get_by_role("button", name="Stop").click()
        expect(box(tab).locator('.talk-answer[data-state="stopped"]')).to_have_count(2)
    assert len(box(tab).locator(".talk-text").first.inner_text()) > 0


def test_a_conversation_keeps_its_weights_when_they_leave_the_list(
    tab: Page, trained: TrainingRun, worker: GpuWorker
) -> None:
    open_run(tab, trained)
    chosen = box(tab).locator(".talk-weights").last
    chosen.select_option(label="step-000001 (step 1)")
    Checkpoint.objects.filter(run=trained).delete()
    tab.locator('[data-part="checkpoints"]').dispatch_event("partchange")
    expect(chosen.locator("option:checked")).to_have_text("No longer listed: step-000001 (step 1)")
    say(tab, "Who are you?")
    expect(box(tab).locator('.talk-answer[data-state="failed"]')).to_have_count(1)


def test_a_setting_that_cannot_be_is_shown_where_it_is_folded_away(tab: Page, alice: User) -> None:
    tab.goto("/playground/")
    settings = box(tab).locator("details.talk-settings")
    settings.locator("summary").click()
    box(tab).get_by_label("Longest answer, tokens").fill("99999")
    settings.locator("summary").click()
    say(tab, "Hello")
    expect(box(tab).get_by_label("Longest answer, tokens")).to_be_focused()
    box(tab).get_by_label("Longest answer, tokens").fill("8")
    box(tab).get_by_label("Temperature").fill("0.72")
    say(tab, "Hello")
    expect(box(tab).locator(".talk-answer")).to_have_count(1)


def test_hostile_text_stays_text(
    tab: Page,
    alice: User,
) -> None:
    tab.goto("/playground/")
    say(tab, HOSTILE)
    expect(box(tab).locator(".talk-said")).to_have_text(HOSTILE)
    answer(HOSTILE)
    expect(box(tab).locator(".talk-text")).to_have_text(HOSTILE)
    assert box(tab).locator("img, script:not([type='application/json'])").count() == 0


def test_a_run_without_weights_offers_to_save(tab: Page, alice: User) -> None:
    run = seed.make_run(alice, name="young")
    recipe_seed.make_recipe(run, state=Recipe.State.RUNNING, next_seq=1, next_step=0)
    open_run(tab, run)
    box(tab).get_by_role("button", name="Remove this column").first.click()
    say(tab, "Hello?")
    expect(box(tab).locator(".talk-note")).to_contain_text("This run has no checkpoint yet")
    box(tab).get_by_role("button", name="Save a checkpoint now").click()
    wait_for(lambda: Operation.objects.filter(run=run, kind="save_weights").exists(), what="the save")
    expect(box(tab).locator(".talk-note")).to_contain_text("Saving the weights")
    seed.add_checkpoint(run, "manual-000000", step=0)
    answer("Here I am")
    expect(box(tab).locator(".talk-text")).to_have_text("Here I am")


def test_an_answer_survives_a_restart_of_the_server(
    tab: Page,
    alice: User,
    server: Server,
) -> None:
    tab.goto("/playground/")
    say(tab, "Are you there?")
    first = wait_for(lambda: Operation.objects.filter(kind="sample").first(), what="the question")
    server.kill()
    expect(box(tab).locator(".talk-note")).to_contain_text("Reconnecting")
    server.start()
    again = wait_for(
        lambda: Operation.objects.filter(kind="sample", pk__gt=first.pk).first(), what="it again"
    )
    Operation.objects.filter(pk=first.pk).update(state="failed", error="stopped")
    assert again.payload_digest
    answer("Back again")
    expect(box(tab).locator(".talk-text")).to_have_text("Back again")


def test_a_question_stays_in_the_box_when_somebody_is_signed_out(tab: Page, alice: User) -> None:
    tab.goto("/playground/")
    say(tab, "Are you there?")
    wait_for(lambda: Operation.objects.filter(kind="sample").exists(), what="the question")
    Session.objects.all().delete()
    expect(box(tab).get_by_role("alert")).to_have_text("You are signed out; reload the page.")
    expect(box(tab).locator('.talk-answer[data-state="failed"] .talk-note')).to_contain_text("signed out")
    say(tab, "And now?")
    expect(box(tab).get_by_label("Message", exact=True)).to_have_value("And now?")
    expect(box(tab).get_by_role("alert")).to_be_visible()
    expect(box(tab).locator(".talk-answer")).to_have_count(1)


def test_the_end_of_answers_is_told_as_it_is(tab: Page, alice: User) -> None:
    tab.goto("/playground/")
    status = box(tab).get_by_role("status")
    box(tab).get_by_role("button", name="Add a column").click()
    say(tab, "Are you there?")
    for _ in range(2):
        row = wait_for(
            lambda: Operation.objects.filter(kind="sample", state="queued").first(), what="a question"
        )
        commits.commit_samples({row.pk: Result(error="no room", category="server")})
    expect(status).to_have_text("2 answers failed.")
    say(tab, "And now?")
    answer("Here I am")
    expect(status).to_have_text("")
    box(tab).get_by_role("button", name="Stop").click()
    expect(status).to_have_text("Stopped.")
    say(tab, "Still?")
    for _ in range(2):
        answer("Here I am")
    expect(status).to_have_text("All answers are there.")
    box(tab).get_by_role("button", name="Clear").click()
    say(tab, "Again?")
    expect(status).to_have_text("")
    box(tab).get_by_role("button", name="Clear").click()
    expect(status).to_have_text("")


def test_the_playground_keeps_up_with_checkpoints(tab: Page, alice: User) -> None:
    run = seed.make_run(alice, name="teacher")
    seed.add_checkpoint(run, "step-000001", step=1)
    tab.clock.install()
    tab.goto("/playground/")
    chosen = box(tab).locator(".talk-weights").last
    expect(chosen.locator("option:checked")).to_have_text("step-000001 (step 1)")
    seed.add_checkpoint(run, "step-000002", step=2)
    tab.clock.run_for(30_000)
    expect(chosen.get_by_role("option", name="step-000002")).to_have_count(1)
    expect(chosen.locator("option:checked")).to_have_text("step-000001 (step 1)")
    seed.add_checkpoint(run, "step-000003", step=3)
    chosen.focus()
    with tab.expect_response("**/weights.json"):
        tab.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # back from another tab
    expect(box(tab).locator(".talk-weights").first.get_by_role("option", name="step-000003")).to_have_count(1)
    expect(chosen.get_by_role("option", name="step-000003")).to_have_count(0)  # it may be open
    chosen.blur()
    expect(chosen.get_by_role("option", name="step-000003")).to_have_count(1)
    expect(chosen.locator("option:checked")).to_have_text("step-000001 (step 1)")
    Checkpoint.objects.get(name="step-000001").delete()
    tab.clock.run_for(30_000)
    expect(chosen.locator("option:checked")).to_have_text("No longer listed: step-000001 (step 1)")


def test_a_look_for_weights_leads_nobody_away_who_was_signed_out(tab: Page, alice: User) -> None:
    tab.clock.install()
    tab.goto("/playground/")
    message = box(tab).get_by_label("Message", exact=True)
    message.evaluate(
        "field => { field.value = 'A long question'; }"
    )  # without a focus there is no socket, which would tell
    Session.objects.all().delete()
    with tab.expect_response("**/login/**"):
        tab.clock.run_for(30_000)
    tab.wait_for_timeout(300)
    expect(message).to_have_value("A long question")
    assert tab.url.endswith("/playground/")
