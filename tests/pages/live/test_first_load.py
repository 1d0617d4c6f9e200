"""A run's page whose first loads fail, as in a restart of the server: it comes to life all the same."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, Route, expect

from runs.models import User
from tests.pages import recipe_seed, seed
from tests.pages.live.browser import LIVE
from tests.pages.live.run_page import add_steps, expect_live, expect_values, open_run
from tests.pages.live.server import Server

pytestmark = LIVE


class Away:
    """Requests to these addresses find no server until it is back."""

    def __init__(self, tab: Page, server: Server, address: str) -> None:
        self.is_back = False
        server.was_away = True
        tab.route(address, self._answer)

    def _answer(self, route: Route) -> None:
        if self.is_back:
            route.continue_()
        else:
            route.abort("connectionrefused")


@pytest.mark.parametrize("num_steps", [20, 13_000])
def test_a_past_that_fails_to_load_is_asked_for_again(
    tab: Page,
    server: Server,
    alice: User,
    num_steps: int,
) -> None:
    run = seed.make_run(alice, name="opened in a restart")
    seed.add_values(run, seed.curve(num_steps))
    away = Away(tab, server, "**/*.json*")
    open_run(tab, run)
    problem = tab.locator("[data-chart-problem]")
    expect(problem).to_contain_text("The charts could not be loaded")
    expect_live(tab)
    add_steps(run, [num_steps + 1])
    expect(tab.locator("[data-chart-grid]")).to_have_attribute("data-cursor", str(2 * num_steps + 2))
    away.is_back = True
    expect(problem).to_be_hidden()
    expect_values(tab, run)


def test_a_fork_whose_ancestors_fail_to_load_is_live_and_shows_them_later(
    tab: Page,
    server: Server,
    alice: User,
) -> None:
    parent = seed.make_run(alice, name="parent")
    seed.add_values(parent, seed.curve(50))
    checkpoint = seed.add_checkpoint(parent, "step-000040", step=40)
    fork = seed.make_fork(alice, checkpoint)
    recipe_seed.make_recipe(fork, first_step=40, next_step=60)
    away = Away(tab, server, "**/ancestry.json")
    open_run(tab, fork)
    expect_live(tab)
    add_steps(fork, range(41, 61))
    expect_values(tab, fork)
    away.is_back = True
    expect(tab.locator('[data-metric="loss"] .chart-legend')).to_contain_text("before the fork")
    expect(tab.locator("[data-chart-problem]")).to_be_hidden()
