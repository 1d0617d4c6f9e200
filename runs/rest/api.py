"""The REST API: its routers, its schema, and its addresses under /rest/v1/."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final, cast

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern, URLResolver, path, re_path
from django.views.decorators.http import require_GET
from ninja import NinjaAPI
from ninja.errors import HttpError, ValidationError
from ninja.operation import Operation

from runs.rest import (
    account,
    boundary,
    checkpoints,
    datasets,
    docs,
    errors,
    metrics,
    records,
    runs,
    sampling,
    server,
    steering,
    webhooks,
)
from runs.rest.bodies import JsonParser
from runs.rest.rendering import Renderer, to_json
from runs.rest.schema import completed

PREFIX: Final = "/rest/v1/"
_DESCRIPTION: Final = (
    "Everything that the pages do, for scripts: upload datasets, start and steer runs, read their "
    "numbers, download adapters, sample. Send a key as `Authorization: Bearer tml-...` or `X-API-Key`."
)


class _Api(NinjaAPI):
    def get_openapi_operation_id(self, operation: Operation) -> str:
        """Return the view's own name, which is unique."""
        return operation.view_func.__name__


def _make() -> NinjaAPI:
    made = _Api(
        title="mintweb REST API",
        version="1",
        description=_DESCRIPTION,
        docs_url=None,
        openapi_url=None,
        auth=[boundary.BearerKey(), boundary.HeaderKey()],
        renderer=Renderer(),
        parser=JsonParser(),
        urls_namespace="rest",
    )
    made.add_decorator(boundary.checked, mode="view")
    for kind in (Exception, HttpError, ValidationError):
        made.add_exception_handler(kind, cast(Any, errors.from_exception))
    made.add_router("runs", runs.router)
    made.add_router("runs", steering.router)
    made.add_router("runs", metrics.router)
    made.add_router("runs", records.router)
    made.add_router("", checkpoints.router)
    made.add_router("datasets", datasets.router)
    made.add_router("samples", sampling.router)
    made.add_router("webhooks", webhooks.router)
    made.add_router("", account.router)
    made.add_router("", server.router)
    return made


api: Final = _make()


@lru_cache(maxsize=1)
def schema() -> dict[str, Any]:
    """Return the OpenAPI document."""
    return completed(api.get_openapi_schema(path_prefix=PREFIX), server=settings.PUBLIC_URL)


@require_GET
def openapi(request: HttpRequest) -> HttpResponse:
    """Answer with the OpenAPI document."""
    return HttpResponse(to_json(schema()), content_type="application/json")


@require_GET
def docs_page(request: HttpRequest) -> HttpResponse:
    """Show what there is, for people."""
    return docs.page(request, schema())


def _patterns() -> Iterator[URLPattern | URLResolver]:
    yield path("openapi.json", boundary.outer(openapi, policy="public"), name="rest-schema")
    docs_page.policy = "public"  # type: ignore[attr-defined]
    yield path("docs", docs_page, name="rest-docs")
    for pattern in api.urls[0]:
        if isinstance(pattern, URLPattern) and pattern.name != "api-root":
            policy = boundary.policy_of(pattern.name or "")
            pattern.callback = boundary.outer(pattern.callback, policy=policy)
            yield pattern
    yield re_path("", boundary.outer(boundary.nowhere), name="rest-nowhere")


urls: Final[list[URLPattern | URLResolver]] = list(_patterns())
