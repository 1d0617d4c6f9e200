"""The pages in a real browser against a real server: live, and complete after every interruption."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from urllib.parse import quote

import pytest
from django.conf import settings
from django.db import connection, transaction
from django.test import Client
from django.utils import timezone
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from runs import events
from runs.models import Metric, TrainingRun, User
from runs.services import accounts
from tests.pages import seed
from tests.up.instances import free_port, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
WATCH = """
window.problems = [];
addEventListener("securitypolicyviolation", (event) => problems.push(`CSP: ${event.violatedDirective} ${event.blockedURI}`));
addEventListener("error", (event) => problems.push(`error: ${event.message}`));
addEventListener("unhandledrejection", (event) => problems.push(`rejection: ${event.reason}`));
window.alert = () => problems.push("a script from data ran");
requestAnimationFrame(function frame() {
  requestAnimationFrame(frame);
});
"""


class Server:
    """The web process on a port of its own; it can be stopped and started again."""

    def __init__(self) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.was_away = False
        # Words of the browser's own about refusals that a test asks for.
        self.refused: tuple[str, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait for it."""
        database = connection.settings_dict
        url = f"postgresql://{database['USER']}@/{database['NAME']}?host={quote(database['HOST'], safe='/')}"
        command = [sys.executable, "-m", "uvicorn", "mintweb.asgi:application", "--port", str(self.port)]
        self._process = subprocess.Popen(
            [*command, "--log-level", "warning", "--no-access-log"],
            env={**os.environ, "DATABASE_URL": url},
            cwd=settings.BASE_DIR,
        )
        wait_for(self._answers, 120)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the server has ended"
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=30):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self.was_away = True
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def server(transactional_db: None) -> Iterator[Server]:
    server = Server()
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with pytest.MonkeyPatch.context() as environment, sync_playwright() as playwright:
        # Playwright keeps an event loop in this thread, which Django would take for asynchronous code.
        environment.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def alice(transactional_db: None) -> User:
    return seed.make_user("alice", "a good long password")


# The browser itself says this when the server refuses what a form holds, which the page shows.
REFUSED = "status of 422"
# And this of a server that is gone, or goes while it answers; the page comes back from both.
AWAY = ("net::ERR_CONNECTION_", "net::ERR_EMPTY_RESPONSE", "before receiving a handshake response")


@pytest.fixture
def tab(browser: Browser, server: Server, alice: User) -> Iterator[Page]:
    """Return alice's browser tab, which fails the test on any error or violation of the content policy."""
    client = Client()
    client.force_login(alice)
    context = browser.new_context(viewport={"width": 1280, "height": 900}, base_url=server.address)
    value = client.cookies["mintweb_session"].value
    context.add_cookies([{"name": "mintweb_session", "value": value, "url": server.address}])
    tab = context.new_page()
    tab.add_init_script(WATCH)
    messages: list[str] = []

    def note(message: ConsoleMessage) -> None:
        told = [REFUSED, *server.refused, *(AWAY if server.was_away else ())]
        if message.type in ("error", "warning") and not any(words in message.text for words in told):
            messages.append(message.text)

    tab.on("console", note)
    yield tab
    problems = [] if tab.url == "about:blank" else tab.evaluate("window.problems")
    context.close()
    assert problems == []
    assert messages == []


def add_steps(
    run: TrainingRun, steps: Sequence[int], *, step_s: float = 1.0, ends_at: datetime | None = None
) -> None:
    values = [
        (2 * step, step, {"loss": 2 / step, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_s": 5e3})
        for step in steps
    ]
    with transaction.atomic():
        seed.add_values(run, values, step_s=step_s, ends_at=ends_at)
        events.run_changed(run.pk, run.owner_id, run.public_id)


def open_run(tab: Page, run: TrainingRun) -> None:
    tab.goto(f"/runs/{quote(run.public_id)}/")


def expect_values(tab: Page, run: TrainingRun) -> None:
    """Wait until the page holds exactly what is stored, and check every step of one chart."""
    number = Metric.objects.filter(run=run).count()
    grid = tab.locator("[data-chart-grid]")
    expect(grid).to_have_attribute("data-num-values", str(number))
    stored = set(Metric.objects.filter(run=run).values_list("name", flat=True))
    for name in stored:
        expected = str(Metric.objects.filter(run=run, name=name).count())
        expect(tab.locator(f'[data-metric="{name}"]')).to_have_attribute("data-num-values", expected)


def shown_steps(tab: Page) -> list[int]:
    """Return the steps of the loss chart's table, oldest first."""
    table = tab.locator('[data-metric="loss"]')
    if table.locator("table").count() == 0:
        table.get_by_role("button", name="Table").click()
    cells = table.locator("tbody tr td:first-child").all_text_contents()
    return [int(cell.replace("\u202f", "")) for cell in reversed(cells)]


def test_a_value_arrives_while_the_page_is_open(tab: Page, alice: User) -> None:
    run = seed.make_run(alice, name="watched")
    open_run(tab, run)
    expect(tab.get_by_text("No values yet")).to_be_visible()
    expect(tab.get_by_role("status").filter(has_text="Live")).to_be_visible()
    for last in range(1, 4):
        add_steps(run, [last])
        expect_values(tab, run)
    assert shown_steps(tab) == [1, 2, 3]
    expect(tab.locator("[data-part=facts]")).to_contain_text("0.6667")
    expect(tab.locator('[data-metric="loss"] canvas')).to_be_visible()


def test_a_reload_shows_the_same_values(tab: Page, alice: User) -> None:
    run = seed.make_run(alice)
    add_steps(run, range(1, 61))
    open_run(tab, run)
    expect_values(tab, run)
    before = shown_steps(tab)
    add_steps(run, range(61, 71))
    expect_values(tab, run)
    tab.reload()
    expect_values(tab, run)
    assert before == list(range(1, 61))
    assert shown_steps(tab) == list(range(1, 71))


def test_a_restarted_server_costs_no_value_and_doubles_none(tab: Page, server: Server, alice: User) -> None:
    run = seed.make_run(alice)
    add_steps(run, range(1, 21))
    open_run(tab, run)
    expect_values(tab, run)
    for first in (21, 41):
        server.kill()
        add_steps(run, range(first, first + 10))
        expect(tab.get_by_role("status").filter(has_text="Reconnecting")).to_be_visible()
        server.start()
        add_steps(run, range(first + 10, first + 20))
        expect_values(tab, run)
    assert shown_steps(tab) == list(range(1, 61))


def test_a_page_left_and_returned_to_catches_up(tab: Page, alice: User) -> None:
    run = seed.make_run(alice)
    add_steps(run, range(1, 11))
    open_run(tab, run)
    expect_values(tab, run)
    tab.goto("about:blank")
    add_steps(run, range(11, 31))
    tab.go_back()
    expect_values(tab, run)
    assert shown_steps(tab) == list(range(1, 31))


def test_a_long_run_is_drawn_from_buckets_and_goes_on_live(tab: Page, alice: User) -> None:
    run = seed.make_run(alice)
    seed.add_values(run, seed.curve(13_000, spike_at=[7000], nan_at=[9000]))
    open_run(tab, run)
    expect_values(tab, run)
    chart = tab.locator('[data-metric="loss"]')
    expect(chart).to_contain_text("1 not finite")
    expect(chart).to_contain_text("steps a point")
    add_steps(run, range(13_001, 13_011))
    expect_values(tab, run)


def test_zoom_follow_log_and_keys(tab: Page, alice: User) -> None:
    run = seed.make_run(alice)
    add_steps(run, range(1, 201))
    open_run(tab, run)
    expect_values(tab, run)
    over = tab.locator('[data-metric="loss"] .u-over')
    over.wait_for()
    box = over.bounding_box()
    assert box is not None
    tab.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50, steps=4)
    tab.mouse.up()
    follow = tab.get_by_role("button", name="ollow")
    expect(follow).to_be_visible()
    assert 45 < shown_steps(tab)[0] < 55
    expect(tab).to_have_url(re.compile("zoom="))
    add_steps(run, range(201, 211))
    expect(follow).to_contain_text("40 new values")
    follow.click()
    expect(follow).to_be_hidden()
    assert shown_steps(tab)[-1] == 210
    tab.get_by_label("Log y").check()
    tab.get_by_label("x axis").select_option("time")
    plot = tab.get_by_role("img", name="Loss per token")
    plot.focus()
    plot.press("ArrowLeft")
    expect(tab.locator('[data-metric="learning_rate"] .chart-readout')).to_contain_text("1.000e-4")


@pytest.mark.parametrize("axis", ["step", "tokens", "time"])
def test_the_last_steps_are_shown_on_every_axis(tab: Page, alice: User, axis: str) -> None:
    run = seed.make_run(alice)
    values = [(2 * step, step, {"loss": 2 / step, "tokens": 64.0}) for step in range(10, 3001, 10)]
    seed.add_values(run, values, step_s=7.0)
    open_run(tab, run)
    expect_values(tab, run)
    tab.get_by_label("x axis").select_option(axis)
    tab.get_by_label("Steps shown").select_option("1000")
    # One more on the left, to which the line goes on.
    assert shown_steps(tab) == list(range(1990, 3001, 10))


def test_a_button_that_copies_says_again_what_it_copies(tab: Page, alice: User) -> None:
    open_run(tab, seed.make_run(alice))
    button = tab.locator("[data-copy-view]")
    expect(button).to_have_text("Copy link")
    button.click()
    expect(button).to_have_text("Copied")
    button.click()
    expect(button).to_have_text("Copy link")


def test_hostile_names_are_text(tab: Page, alice: User, tmp_path_factory: pytest.TempPathFactory) -> None:
    payload = "<img src=x onerror=alert(1)>"
    tokenizer = seed.make_base_model(tmp_path_factory.mktemp("tokenizer"))
    run = seed.make_run(alice, name=payload, user_metadata={payload: payload})
    seed.add_values(
        run, [(1, 1, {payload: 1.0, "constructor": 2.0, "__proto__": 3.0}), (2, 2, {payload: 1.0})]
    )
    seed.add_sample(run, tokenizer.encode(payload).ids, [tokenizer.encode(payload).ids])
    open_run(tab, run)
    expect(tab.locator("[data-chart-grid]")).to_have_attribute("data-num-values", "4")
    expect(tab.get_by_role("heading", name=payload, level=3)).to_be_visible()
    expect(tab.locator(".sample-text")).to_contain_text(payload)
    tab.goto("/runs/")
    expect(tab.get_by_role("link", name=payload)).to_be_visible()
    events.run_changed(run.pk, run.owner_id, run.public_id)
    assert tab.locator("img[src=x]").count() == 0


def test_the_list_is_live_and_moves_by_keys(tab: Page, alice: User) -> None:
    first = seed.make_run(alice, name="first")
    tab.goto("/runs/")
    expect(tab.get_by_role("status").filter(has_text="Live")).to_be_visible()
    # A run whose last value is some seconds old waits for its client.
    add_steps(first, range(1, 6), ends_at=timezone.now() + timedelta(hours=1))
    row = tab.locator(f'[data-run="{first.public_id}"]')
    expect(row).to_contain_text("0.4000")
    expect(row).to_contain_text("running")
    expect(row.locator("svg")).to_be_visible()
    seed.make_run(alice, name="second")
    expect(tab.locator("[data-run]").first).to_contain_text("second")
    tab.keyboard.press("/")
    expect(tab.get_by_role("searchbox")).to_be_focused()
    tab.get_by_role("searchbox").blur()
    tab.keyboard.press("?")
    expect(tab.get_by_role("heading", name="Keyboard")).to_be_visible()
    tab.keyboard.press("Escape")
    for key in ("j", "j", "Enter"):
        tab.keyboard.press(key)
    tab.wait_for_url("**/runs/*train*/")
    expect(tab.get_by_role("heading", level=1)).to_contain_text("first")


def test_the_first_run_takes_the_place_of_the_instructions(tab: Page, alice: User) -> None:
    tab.goto("/runs/")
    expect(tab.get_by_role("heading", name="Run your own loop")).to_be_visible()
    expect(tab.get_by_role("status").filter(has_text="Live")).to_be_visible()
    seed.make_run(alice, name="here I am")
    expect(tab.get_by_role("link", name="here I am")).to_be_visible()


def test_a_login_link_signs_in_and_a_theme_stays(browser: Browser, server: Server, alice: User) -> None:
    context = browser.new_context(base_url=server.address)
    tab = context.new_page()
    tab.goto(f"/login/{accounts.create_login_link(alice)}/")
    tab.get_by_role("button", name="Sign in").click()
    tab.wait_for_url("**/runs/")
    tab.goto("/settings/")
    tab.get_by_label("Dark").check()
    tab.reload()
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    tab.get_by_role("button", name="Sign out").click()
    tab.wait_for_url("**/login/")
    context.close()
