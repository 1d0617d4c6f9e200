"""Steering, events, lineage and the film strip in a real browser: live, and without disturbing who uses them."""

from __future__ import annotations

from django.db import transaction
from django.test import Client
from playwright.sync_api import APIResponse, Browser, Page, Route, expect
from tokenizers import Tokenizer

from runs import events
from runs.models import FixedSample, Operation, Recipe, RunEvent, TrainingRun, User
from tests.pages import recipe_seed, seed
from tests.pages.live.browser import LIVE
from tests.pages.live.run_page import PROMPT, expect_live, expect_values, note, open_run, shown_steps, steps
from tests.pages.live.server import Server

pytestmark = LIVE
PAYLOAD = "<img src=x onerror=alert(1)>"


def answer(run: TrainingRun, tokenizer: Tokenizer, step: int, text: str) -> None:
    with transaction.atomic():
        recipe_seed.add_fixed_sample(run, tokenizer, step=step, prompt=PROMPT, answer=text)
        events.run_changed(run.pk, run.owner_id, run.public_id)


def test_a_run_is_paused_and_resumed_without_leaving_the_page(tab: Page, run: TrainingRun) -> None:
    open_run(tab, run)
    expect_live(tab)
    tab.evaluate("window.isSamePage = true")
    tab.get_by_role("button", name="Pause", exact=True).focus()
    tab.keyboard.press("Enter")
    expect(tab.get_by_text("The run pauses after the steps")).to_be_visible()  # for some seconds
    expect(tab.get_by_role("button", name="Resume")).to_be_visible()
    expect(tab.get_by_role("button", name="Pause", exact=True)).to_have_count(0)
    expect(tab.get_by_role("region", name="State of the run")).to_contain_text("Paused at step 60")
    assert tab.evaluate("document.activeElement.closest('[data-part=steering]') !== null")
    expect(tab.locator(".lane-mark")).to_have_attribute("aria-label", "paused at step 60")
    tab.get_by_role("button", name="Resume").click()
    expect(tab.get_by_role("button", name="Pause", exact=True)).to_be_visible()
    assert Recipe.objects.get(run=run).state == Recipe.State.QUEUED
    assert tab.evaluate("window.isSamePage") is True


def test_a_run_that_is_gone_meanwhile_says_so_in_the_servers_words(
    tab: Page,
    server: Server,
    run: TrainingRun,
) -> None:
    open_run(tab, run)
    expect_live(tab)
    server.refused = ("status of 404",)
    Recipe.objects.filter(run=run).delete()
    tab.get_by_role("button", name="Pause", exact=True).click()
    alert = tab.locator("[data-steer-answer]")
    expect(alert).to_have_text(f"There is no training run '{run.public_id}' with a recipe.")


def test_an_answer_that_was_overtaken_is_not_shown(tab: Page, run: TrainingRun) -> None:
    open_run(tab, run)
    expect_live(tab)
    late: list[tuple[Route, APIResponse]] = []
    tab.route("**/panels/**", lambda route: late.append((route, route.fetch())), times=1)
    with tab.expect_request("**/panels/**"):
        note(run, "saved", 50, checkpoint="step-000050")
    while not late:
        tab.wait_for_timeout(50)
    tab.get_by_role("button", name="Pause", exact=True).click()
    expect(tab.get_by_role("button", name="Resume")).to_be_visible()
    route, overtaken = late[0]
    with tab.expect_response("**/panels/**"):
        route.fulfill(response=overtaken)
    tab.wait_for_timeout(300)
    assert tab.get_by_role("button", name="Resume").is_visible()


def test_an_open_dialog_and_a_typed_value_outlive_a_refresh(tab: Page, run: TrainingRun) -> None:
    open_run(tab, run)
    expect_live(tab)
    tab.get_by_role("button", name="Change settings").click()
    dialog = tab.get_by_role("dialog", name="Change settings")
    rate = dialog.get_by_label("Learning rate")
    rate.fill("fast")
    note(run, "saved", 50, checkpoint="step-000050")
    expect(tab.locator("[data-part=events]")).to_contain_text("step-000050")
    expect(rate).to_be_focused()
    expect(rate).to_have_value("fast")
    dialog.get_by_role("button", name="Change", exact=True).click()
    expect(rate).to_have_attribute("aria-invalid", "true")
    expect(dialog.locator(".field-error")).to_contain_text("must be a valid number")
    expect(rate).to_be_focused()
    rate.fill("1e-4")
    dialog.get_by_label("Prompt 1").fill("What does the owl say?")
    dialog.get_by_role("button", name="Change", exact=True).click()
    expect(dialog).to_be_hidden()
    config = Recipe.objects.get(run=run).config
    assert (config["learning_rate"], config["samples"]["prompts"]) == (1e-4, ["What does the owl say?"])
    assert config["eval_every"] == 40
    expect(tab.locator("[data-part=recipe-settings]")).to_contain_text("2 changed while it trained")
    tab.get_by_role("button", name="Change settings").click()
    expect(rate).to_have_value("0.0001")


def test_folded_details_focus_and_selection_outlive_a_refresh(tab: Page, run: TrainingRun) -> None:
    open_run(tab, run)
    expect_live(tab)
    details = tab.locator("[data-part=recipe-settings] details")
    details.locator("summary").click()
    tab.get_by_role("button", name="Save checkpoint now").focus()
    tab.evaluate("getSelection().selectAllChildren(document.querySelector('.settings-group h3'))")
    for number in range(2):
        note(run, "saved", 40 + number, checkpoint=f"step-{number}")
        expect(tab.locator("[data-part=events]")).to_contain_text(f"step-{number}")
    expect(details).to_have_attribute("open", "")
    expect(tab.get_by_role("button", name="Save checkpoint now")).to_be_focused()
    assert tab.evaluate("getSelection().toString()") == "Model and data"


def test_a_stop_asks_what_to_keep(tab: Page, run: TrainingRun) -> None:
    seed.add_checkpoint(run, "step-000040", step=40)
    open_run(tab, run)
    tab.get_by_role("button", name="Stop").click()
    dialog = tab.get_by_role("dialog", name="Stop this run?")
    expect(dialog).to_contain_text("named final, at step 60")
    expect(dialog).to_contain_text("Deletes the run's checkpoint and its current weights, for good.")
    tab.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(tab.get_by_role("button", name="Stop")).to_be_focused()
    tab.get_by_role("button", name="Stop").click()
    dialog.get_by_role("button", name="Stop and save").click()
    expect(tab.get_by_role("region", name="State of the run")).to_contain_text(
        "Stopping: saving a last checkpoint"
    )
    assert Recipe.objects.get(run=run).state == Recipe.State.STOPPING


def test_dialogs_and_forms_work_without_javascript(
    browser: Browser,
    server: Server,
    alice: User,
    run: TrainingRun,
) -> None:
    client = Client()
    client.force_login(alice)
    context = browser.new_context(base_url=server.address, java_script_enabled=False)
    value = client.cookies["mintweb_session"].value
    context.add_cookies([{"name": "mintweb_session", "value": value, "url": server.address}])
    plain = context.new_page()
    open_run(plain, run)
    plain.get_by_role("button", name="Stop").click()
    plain.get_by_role("button", name="Stop and discard").click()
    expect(plain.get_by_text("The run stops; its weights are deleted.")).to_be_visible()
    assert Recipe.objects.get(run=run).state == Recipe.State.DISCARDING
    context.close()


def test_validation_is_drawn_beside_the_training_loss(tab: Page, run: TrainingRun) -> None:
    recipe_seed.add_evaluations(run, [0, 40], labels=["held out", PAYLOAD])
    Recipe.objects.filter(run=run).update(best_step=40)
    open_run(tab, run)
    chart = tab.locator('[data-metric="loss"]')
    legend = chart.locator(".chart-legend li")
    expect(legend).to_have_text(["training", "validation", f"validation: {PAYLOAD}", "validation: held out"])
    expect(tab.locator('[data-metric="validation_loss"]')).to_have_count(0)
    expect(chart.locator(".chart-summary")).to_contain_text("validation 2.9")
    chart.get_by_role("button", name="Table").click()
    row = chart.locator("tbody tr", has=tab.get_by_role("cell", name="40", exact=True))
    assert row.locator("td").nth(3).text_content() != ""
    with tab.expect_download() as download:
        chart.get_by_role("button", name="PNG").click()
    assert download.value.suggested_filename == "loss.png"


def test_a_run_that_is_only_validated_yet_has_a_chart(tab: Page, alice: User, tokenizer: Tokenizer) -> None:
    run = seed.make_run(alice)
    recipe_seed.make_recipe(run)
    recipe_seed.add_evaluations(run, [0])
    open_run(tab, run)
    expect(tab.locator('[data-metric="loss"] canvas')).to_be_visible()
    expect(tab.locator('[data-metric="loss"] .chart-summary')).to_contain_text("validation")


def test_events_are_marks_that_tell_more(tab: Page, run: TrainingRun) -> None:
    recipe_seed.add_event(run, "started", 1, num_steps=400)
    recipe_seed.add_event(run, "failed", 30, error=PAYLOAD)
    recipe_seed.add_event(run, "saved", 59, checkpoint="step-000059")
    recipe_seed.add_event(run, "best", 59, validation_loss=1.25)
    open_run(tab, run)
    marks = tab.locator(".lane-mark")
    expect(marks).to_have_count(3)
    marks.nth(1).hover()
    detail = tab.locator(".lane-detail")
    expect(detail).to_contain_text(f"failed at step 30 \u00b7 error {PAYLOAD}")
    tab.mouse.move(5, 5)
    expect(detail).to_be_hidden()
    marks.nth(2).focus()
    expect(detail).to_contain_text("best at step 59")
    expect(detail).to_contain_text("saved at step 59")
    tab.keyboard.press("ArrowLeft")
    expect(marks.nth(1)).to_be_focused()
    note(run, "paused", 45)
    expect(marks).to_have_count(4)
    expect(marks.nth(1)).to_be_focused()
    assert tab.locator("img[src=x]").count() == 0


def test_a_run_that_went_back_draws_each_step_once(tab: Page, alice: User, tokenizer: Tokenizer) -> None:
    run = seed.make_run(alice)
    recipe_seed.make_recipe(run)
    steps(run, range(1, 41), first_seq=1, loss=2.0)
    open_run(tab, run)
    expect_values(tab, run)
    expect_live(tab)
    steps(run, range(31, 51), first_seq=50, loss=1.0)
    expect_values(tab, run)
    assert shown_steps(tab) == list(range(1, 51))
    legend = tab.locator('[data-metric="loss"] .chart-legend')
    expect(legend).to_contain_text("left behind")
    tab.reload()
    expect_values(tab, run)
    assert shown_steps(tab) == list(range(1, 51))


def test_a_long_run_that_goes_back_is_read_again(tab: Page, alice: User, tokenizer: Tokenizer) -> None:
    run = seed.make_run(alice)
    recipe_seed.make_recipe(run)
    seed.add_values(run, seed.curve(13_000))
    open_run(tab, run)
    expect_values(tab, run)
    expect_live(tab)
    steps(run, range(12_001, 12_011), first_seq=30_000, loss=1.0)
    expect_values(tab, run)
    chart = tab.locator('[data-metric="loss"]')
    expect(chart.locator(".chart-legend")).to_contain_text("left behind")
    assert shown_steps(tab)[-1] <= 12_010
    steps(run, range(12_011, 12_021), first_seq=30_100, loss=1.0)
    expect_values(tab, run)


def test_a_fork_goes_on_from_its_parents_curve(tab: Page, run: TrainingRun, alice: User) -> None:
    checkpoint = seed.add_checkpoint(run, "step-000040", step=40)
    fork = seed.make_fork(alice, checkpoint)
    recipe_seed.make_recipe(fork, first_step=40, next_step=60)
    steps(fork, range(41, 61), first_seq=1, loss=1.0)
    open_run(tab, fork)
    legend = tab.locator('[data-metric="loss"] .chart-legend')
    expect(legend).to_contain_text("before the fork")
    assert shown_steps(tab) == list(range(41, 61))
    tab.get_by_label("x axis").select_option("tokens")
    expect(tab.locator('[data-metric="loss"] canvas')).to_be_visible()
    assert "axis=tokens" in tab.url
    tab.get_by_role("link", name="steered").click()
    expect(tab.get_by_role("link", name="fork", exact=True)).to_be_visible()


def test_answers_come_into_the_film_strip_while_it_is_open(
    tab: Page,
    run: TrainingRun,
    tokenizer: Tokenizer,
) -> None:
    recipe_seed.add_fixed_sample(run, tokenizer, step=None, prompt=PROMPT, answer="a a a")
    waiting = recipe_seed.add_fixed_sample(run, tokenizer, step=10, prompt=PROMPT, answer=None, is_asked=True)
    open_run(tab, run)
    expect_live(tab)
    cell = tab.locator('.film-cell[data-key="1-10"]')
    expect(cell).to_contain_text("waiting for its answer")
    done = recipe_seed.add_fixed_sample(run, tokenizer, step=11, prompt="x", answer=f"In a {PAYLOAD} cave.")
    with transaction.atomic():
        FixedSample.objects.filter(pk=waiting.pk).update(operation=done.operation)
        done.delete()
        events.run_changed(run.pk, run.owner_id, run.public_id)
    expect(cell).to_contain_text(f"{PAYLOAD} cave.")
    expect(cell.locator("ins").first).to_be_visible()
    assert tab.locator("img[src=x]").count() == 0
    assert Operation.objects.filter(state=Operation.State.QUEUED).count() == 1


def test_the_film_strip_is_scrubbed_and_stays_where_it_is(
    tab: Page,
    run: TrainingRun,
    tokenizer: Tokenizer,
) -> None:
    recipe_seed.add_fixed_sample(run, tokenizer, step=None, prompt=PROMPT, answer="a a a")
    for step in range(1, 31):
        recipe_seed.add_fixed_sample(run, tokenizer, step=step, prompt=PROMPT, answer=f"cave {step}")
    open_run(tab, run)
    expect_live(tab)
    strip = tab.locator("[data-film-scroll]")
    chosen = strip.locator(".film-head.is-chosen")
    expect(chosen).to_have_text("step 30")
    strip.scroll_into_view_if_needed()
    expect(tab.locator('.film-cell[data-key="1-30"]')).to_be_in_viewport()
    strip.focus()
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    expect(chosen).to_have_text("step 28")
    slider = tab.get_by_label("Step of the samples")
    slider.fill("5")
    expect(chosen).to_have_text("step 11")
    expect(slider).to_have_attribute("aria-valuetext", "step 11")
    answer(run, tokenizer, 31, "cave 31")
    expect(tab.locator('.film-cell[data-key="1-31"]')).to_have_count(1)
    expect(chosen).to_have_text("step 11")
    tab.get_by_role("link", name="6 older").click()
    expect(tab.locator('.film-cell[data-key="1-1"]')).to_have_count(1)
    expect(chosen).to_have_text("step 11")
    strip.focus()
    tab.keyboard.press("End")
    expect(chosen).to_have_text("step 31")
    answer(run, tokenizer, 32, "cave 32")
    expect(chosen).to_have_text("step 32")
    tab.get_by_label("Show removed words").check()
    expect(tab.locator('.film-cell[data-key="1-32"] del')).to_be_visible()


def test_a_restarted_server_costs_no_event(tab: Page, server: Server, run: TrainingRun) -> None:
    open_run(tab, run)
    expect_live(tab)
    server.kill()
    recipe_seed.add_event(run, "paused", 50)
    Recipe.objects.filter(run=run).update(state=Recipe.State.PAUSED)
    expect(tab.get_by_role("status").filter(has_text="Reconnecting")).to_be_visible()
    server.start()
    expect(tab.get_by_role("button", name="Resume")).to_be_visible()
    expect(tab.locator(".lane-mark")).to_have_attribute("aria-label", "paused at step 50")
    assert RunEvent.objects.filter(run=run).count() == 1
