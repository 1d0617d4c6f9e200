"""A loop whose database refuses, breaks off or is away in the middle of a turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import OperationalError, close_old_connections, connection

from runs.models import Recipe
from runs.services import holdups
from runs.services.recipe_rows import State
from tests.recipes.conftest import ended, turn_until

Begin = Callable[..., Recipe]
END_CONNECTION = "SELECT pg_terminate_backend(pg_backend_pid())"


@contextmanager
def at_query(of: str, sql: str) -> Iterator[list[str]]:
    """Have the database run a statement of ours before the loop's next query that names `of`; yields a list of these."""
    reached: list[str] = []

    def execute(run: Any, query: str, params: Any, many: bool, context: Any) -> Any:
        if not reached and of in query:
            reached.append(query)
            run(sql, None, False, context)
        return run(query, params, many, context)

    with connection.execute_wrapper(execute):
        yield reached


def test_what_the_database_refuses_for_good_ends_one_run_and_holds_up_no_other(begin: Begin) -> None:
    first, second = begin(num_steps=2), begin(num_steps=2)
    too_many = ", ".join(["0"] * 1_700)  # targets of a list: PostgreSQL takes 1,664

    with at_query('UPDATE "runs_recipe"', f"SELECT {too_many}") as reached:
        second = ended(second)

    assert reached
    first.refresh_from_db()
    assert (first.state, first.error) == (State.FAILED, "the server failed: OperationalError")
    assert second.state == State.FINISHED


def test_what_the_database_refuses_for_now_ends_no_run(begin: Begin) -> None:
    recipe = begin(num_steps=2)

    with at_query('UPDATE "runs_recipe"', "SELECT pg_cancel_backend(pg_backend_pid())") as reached:
        recipe = turn_until(recipe, lambda row: row.run.held_up, what="the cancelled query")

    assert reached
    assert recipe.run.held_up == holdups.NO_DATABASE_FOR_STEP
    recipe = ended(recipe)
    assert (recipe.state, recipe.error, recipe.run.held_up) == (State.FINISHED, "", "")


def test_a_connection_that_breaks_in_a_transaction_ends_no_run(begin: Begin) -> None:
    recipe = begin(num_steps=2)

    with at_query('UPDATE "runs_recipe"', END_CONNECTION) as reached:
        recipe = ended(recipe)

    assert reached
    assert (recipe.state, recipe.error) == (State.FINISHED, "")


def test_a_database_that_is_away_is_the_outage_of_all_and_holds_up_no_run(
    begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = begin(num_steps=2)

    with at_query('FROM "runs_evaluation"', END_CONNECTION), pytest.raises(OperationalError):
        ended(recipe)

    close_old_connections()
    recipe = ended(recipe)
    assert (recipe.state, recipe.error) == (State.FINISHED, "")
    assert "is held up" not in caplog.text
