"""A web process and a browser tab for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from django.test import Client
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright
from tokenizers import Tokenizer

from runs.models import DatasetVersion, TrainingRun, User
from tests.pages import recipe_seed, seed
from tests.pages.live.browser import AWAY, CHROMIUM, REFUSED, WATCH
from tests.pages.live.run_page import PROMPT
from tests.pages.live.server import Server
from tests.pages.new_run_form import make_dataset, make_sizes


@pytest.fixture
def server(transactional_db: None) -> Iterator[Server]:
    """Return the web process of this test, over the database of the test."""
    server = Server()
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return a browser for the tests of a file."""
    with pytest.MonkeyPatch.context() as environment, sync_playwright() as playwright:
        # Playwright keeps an event loop in this thread, which Django would take for asynchronous code.
        environment.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def alice(transactional_db: None) -> User:
    """Return the person who is signed in; what the test stores is there for the web process."""
    return seed.make_user("alice", "a good long password")


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


@pytest.fixture
def tokenizer(transactional_db: None, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Enter a loaded base model and return its tokenizer."""
    return seed.make_base_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def run(alice: User, tokenizer: Tokenizer) -> TrainingRun:
    """Return a run of alice's without code, with values and a prompt to sample."""
    run = seed.make_run(alice, name="steered", source="browser", worker=seed.make_worker())
    seed.add_values(run, seed.curve(60))
    recipe_seed.make_recipe(run, prompts=[PROMPT])
    return run


@pytest.fixture
def form_base_model(transactional_db: None, tmp_path: Path) -> Tokenizer:
    """Have a base model whose worker told its sizes."""
    tokenizer = seed.make_base_model(tmp_path / "tokenizer")
    worker = seed.make_worker()
    worker.memory_bytes = 8_000_000_000
    worker.save(update_fields=["memory_bytes"])
    make_sizes(worker)
    return tokenizer


@pytest.fixture
def dataset(alice: User) -> DatasetVersion:
    """Return 400 rows."""
    return make_dataset(alice)
