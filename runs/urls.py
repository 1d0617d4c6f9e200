"""Table of contents: every route of the product and, beside each, who may use it.

An SDK route's policy is its endpoint's `needs_key`; a page's is its view's `policy`; tests walk
these lists and fail on a route without one.
"""

from __future__ import annotations

from django.urls import URLPattern, path

from runs.api import sdk
from runs.pages import health

sdk_routes = sdk.routes

health_urls = [
    path("health", health.live, name="health"),
    path("health/ready", health.ready, name="health-ready"),
]

page_urls: list[URLPattern] = []

socket_routes: list[URLPattern] = []
