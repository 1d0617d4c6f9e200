"""Django's own routes: health, pages and the REST API. The SDK's routes are entered in `mintweb.asgi`."""

from __future__ import annotations

from django.urls import include, path

from runs import urls as runs_urls

urlpatterns = [
    path("", include(runs_urls.health_urls)),
    path("", include(runs_urls.page_urls)),
    path("rest/v1/", include(runs_urls.rest_urls)),
]
