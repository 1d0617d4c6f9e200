"""The OpenAPI document is true: requests made from it, right and wrong, are answered as it says, never by a 5xx."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from django.core.signals import request_finished, request_started
from django.core.wsgi import get_wsgi_application
from django.db import close_old_connections
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from runs.models import Recipe
from runs.rest.api import schema as document
from tests.pages import recipe_seed, seed
from tests.rest.client import Rest
from tests.rest.test_boundary import foreign_ids

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
    ignored_auth,
]
MAX_EXAMPLES = 12
OPERATIONS = [(method.upper(), path) for path, methods in document()["paths"].items() for method in methods]
pytestmark = [
    pytest.mark.django_db,
    # Files are sent by an asynchronous iterator, which WSGI reads to its end first.
    pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume asynchronous iterators"),
]


@pytest.fixture(scope="module")
def api() -> Iterator[Any]:
    """Return the document as Schemathesis reads it."""
    loaded = schemathesis.openapi.from_dict(document())
    loaded.app = get_wsgi_application()
    ends = (request_started, request_finished)
    for signal in ends:  # the connection is that of the test, which rolls back
        signal.disconnect(close_old_connections)
    yield loaded
    for signal in ends:
        signal.connect(close_old_connections)


@pytest.fixture
def ids(alice: Rest, recipe: Recipe, request: pytest.FixtureRequest, path: str) -> dict[str, dict[str, str]]:
    """Return the ids of objects that are there, by the first word of the address."""
    version = recipe.dataset_version
    if "/versions" in path:  # only there a version needs its files, which take a second to make
        version = request.getfixturevalue("version")
    recipe_seed.add_evaluations(recipe.run, [10, 20])
    recipe_seed.add_event(recipe.run, "paused", 10, why="test")
    seed.make_worker()
    return foreign_ids(alice, recipe, version)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_the_document_says(
    api: Any, alice: Rest, ids: dict[str, dict[str, str]], method: str, path: str
) -> None:
    operation = api[path][method]
    known = ids.get(path.split("/")[3], {})
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))

    @hypothesis.given(case=cases, is_known=st.booleans())
    def try_it(case: Any, is_known: bool) -> None:
        if is_known:
            case.path_parameters = {
                name: known.get(name, value) for name, value in case.path_parameters.items()
            }
        # A wrong parameter may be put right here, or be nothing at all in an address; a wrong body stays wrong.
        checks = [*CHECKS, negative_data_rejection] if _has_wrong_body(case) else CHECKS
        case.call_and_validate(headers={"Authorization": f"Bearer {alice.key}"}, checks=checks)

    _seldom(try_it)()


def _has_wrong_body(case: Any) -> bool:
    body = case.meta.components.get(ParameterLocation.BODY)
    return body is not None and body.mode == GenerationMode.NEGATIVE


def _seldom(test: Callable[[], None]) -> Callable[[], None]:
    """Try the same few examples each time."""
    settings = hypothesis.settings(
        max_examples=MAX_EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    return settings(test)
