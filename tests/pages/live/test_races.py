"""Answers that overtake one another, presses that come twice and lines that go dead: what a slow server makes of a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from re import Pattern

import pytest
from playwright.sync_api import APIResponse, Page, Request, Route, expect
from tokenizers import Tokenizer

from runs.models import Operation, Recipe, TrainingRun, User
from tests.pages import recipe_seed, seed
from tests.pages.live.browser import LIVE
from tests.pages.live.new_run_page import card, choose, field
from tests.pages.live.run_page import PROMPT, expect_live, expect_values, note, open_run, steps
from tests.pages.live.talking import answer as answer_question
from tests.pages.live.talking import box, say
from tests.pages.new_run_form import NEW, make_dataset, make_sizes
from tests.worker.conftest import wait_for

pytestmark = LIVE


class Late:
    """An answer of the server that is kept back: the page is given it when the test says so."""

    def __init__(self, tab: Page, address: str | Pattern[str]) -> None:
        self._tab = tab
        self._address = address
        self._held: list[tuple[Route, APIResponse]] = []
        tab.route(address, lambda route: self._held.append((route, route.fetch())), times=1)

    def wait(self) -> None:
        """Wait until the server has answered."""
        while not self._held:
            self._tab.wait_for_timeout(50)

    def arrive(self) -> None:
        """Let the page have it, and the time to use it."""
        route, reply = self._held[0]
        with self._tab.expect_response(self._address):
            route.fulfill(response=reply)
        self._tab.wait_for_timeout(300)


@contextmanager
def requests_to(tab: Page, part: str) -> Iterator[list[str]]:
    """Collect the addresses with a part in them that are asked while the `with` lasts."""
    found: list[str] = []

    def collect(request: Request) -> None:
        if part in request.url:
            found.append(request.url)

    tab.on("request", collect)
    yield found
    tab.remove_listener("request", collect)


def stop_the_clock(tab: Page) -> None:
    """Let the page's timers run only when the test says so."""
    tab.clock.install()
    tab.clock.pause_at(datetime.now() + timedelta(minutes=1))  # noqa: DTZ005 - as the page has it


def test_facts_that_came_over_the_line_outlive_an_older_answer(tab: Page, run: TrainingRun) -> None:
    open_run(tab, run)
    expect_live(tab)
    late = Late(tab, "**/panels/**")
    note(run, "saved", 50, checkpoint="step-000050")
    late.wait()
    tab.route("**/panels/**", lambda route: None)  # those after it are never answered
    steps(run, [61], first_seq=1000, loss=0.125)
    facts = tab.locator("[data-part=facts]")
    expect(facts).to_contain_text("0.1250")
    late.arrive()
    expect(tab.locator("[data-part=events]")).to_contain_text("step-000050")
    assert "0.1250" in facts.inner_text()


def test_an_older_past_does_not_take_the_place_of_a_newer_one(
    tab: Page,
    alice: User,
    tokenizer: Tokenizer,
) -> None:
    run = seed.make_run(alice)
    recipe_seed.make_recipe(run)
    seed.add_values(run, seed.curve(13_000))
    open_run(tab, run)
    expect_values(tab, run)
    expect_live(tab)
    late = Late(tab, re.compile(r"/series\.json\?name=loss&"))
    tab.get_by_label("Log y").check()  # which asks again
    late.wait()
    steps(run, range(12_001, 12_011), first_seq=30_000, loss=1.0)  # it went back
    expect_values(tab, run)
    legend = tab.locator('[data-metric="loss"] .chart-legend')
    expect(legend).to_contain_text("left behind")
    late.arrive()
    assert "left behind" in legend.inner_text()


def test_a_fork_that_is_opened_before_its_first_value_shows_its_parent(
    tab: Page,
    run: TrainingRun,
    alice: User,
) -> None:
    checkpoint = seed.add_checkpoint(run, "step-000040", step=40)
    fork = seed.make_fork(alice, checkpoint)
    recipe_seed.make_recipe(fork, first_step=40, next_step=60)
    open_run(tab, fork)
    expect_live(tab)
    steps(fork, range(41, 61), first_seq=1, loss=1.0)
    expect(tab.locator('[data-metric="loss"] .chart-legend')).to_contain_text("before the fork")


def test_a_form_on_its_way_is_not_sent_again_after_a_refresh(tab: Page, run: TrainingRun) -> None:
    open_run(tab, run)
    expect_live(tab)
    pause = tab.get_by_role("button", name="Pause", exact=True)
    waiting: list[Route] = []
    tab.route("**/pause", lambda route: waiting.append(route))
    with requests_to(tab, "/pause") as sent:
        pause.click()
        note(run, "saved", 50, checkpoint="step-000050")
        expect(tab.locator("[data-part=events]")).to_contain_text("step-000050")
        pause.click()
        expect(pause).to_be_visible()
        assert len(sent) == 1
    waiting[0].continue_()
    expect(tab.get_by_role("button", name="Resume")).to_be_visible()


def test_a_slow_preview_does_not_put_off_the_next(
    tab: Page,
    alice: User,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    worker = seed.make_worker()
    seed.make_base_model(tmp_path_factory.mktemp("tokenizer"))
    make_sizes(worker)
    dataset = make_dataset(alice)
    stop_the_clock(tab)
    tab.goto(NEW)
    expect(tab.get_by_text("Choose a dataset to see steps")).to_be_visible()
    late = Late(tab, "**/preview")
    choose(tab, dataset)
    tab.clock.run_for(300)
    late.wait()
    field(tab, "Batch size").fill("16")
    late.arrive()
    tab.clock.run_for(300)
    expect(card(tab, "Steps")).to_contain_text("72")


def test_a_line_that_goes_dead_costs_no_answer(tab: Page, alice: User) -> None:
    tab.clock.install()
    tab.goto("/playground/")
    say(tab, "Are you there?")
    first = wait_for(lambda: Operation.objects.filter(kind="sample").first(), what="the question")
    tab.clock.fast_forward(20_000)  # nothing was heard all that time
    asked_again = Operation.objects.filter(kind="sample", state="queued", pk__gt=first.pk)
    wait_for(asked_again.exists, what="it again")
    answer_question("Here I am")
    expect(box(tab).locator(".talk-text")).to_have_text("Here I am")


def test_stop_holds_while_the_weights_are_being_saved(
    tab: Page,
    alice: User,
) -> None:
    run = seed.make_run(alice, name="young")
    recipe_seed.make_recipe(run, state=Recipe.State.RUNNING, next_seq=1, next_step=0)
    stop_the_clock(tab)
    open_run(tab, run)
    box(tab).get_by_role("button", name="Remove this column").first.click()
    say(tab, "Hello?")
    box(tab).get_by_role("button", name="Save a checkpoint now").click()
    expect(box(tab).locator(".talk-note")).to_contain_text("Saving the weights")
    box(tab).get_by_role("button", name="Stop").click()
    stopped = box(tab).locator('.talk-answer[data-state="stopped"]')
    expect(stopped).to_be_visible()
    tab.clock.run_for(3_000)  # it would look again
    expect(stopped).to_be_visible()
    expect(box(tab).get_by_role("button", name="Stop")).to_be_hidden()


def test_a_column_that_is_chosen_while_the_strip_still_moves_stays_chosen(
    tab: Page,
    run: TrainingRun,
    tokenizer: Tokenizer,
) -> None:
    recipe_seed.add_fixed_sample(run, tokenizer, step=None, prompt=PROMPT, answer="a a a")
    for step in range(1, 31):
        recipe_seed.add_fixed_sample(run, tokenizer, step=step, prompt=PROMPT, answer=f"cave {step}")
    open_run(tab, run)
    strip = tab.locator("[data-film-scroll]")
    expect(strip.locator(".film-head.is-chosen")).to_have_text("step 30")
    tab.get_by_label("Step of the samples").fill("5")
    strip.focus()
    tab.keyboard.press("End")
    tab.keyboard.press("ArrowLeft")
    tab.wait_for_function(
        "() => { const strip = document.querySelector('[data-film-scroll]');"
        " return strip.scrollLeft + strip.clientWidth >= strip.scrollWidth - 8; }"
    )
    tab.wait_for_timeout(700)
    assert strip.locator(".film-head.is-chosen").inner_text() == "step 29"
