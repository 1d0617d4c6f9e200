"""Table of contents: every route of the product and, beside each, who may use it.

An SDK route's policy is its endpoint's `needs_key`; a page's is its view's `policy`; tests walk
these lists and fail on a route without one.
"""

from __future__ import annotations

from django.urls import URLPattern, path

from runs import consumers
from runs.api import sdk
from runs.pages import account, checkpoints, health, login, run_data, run_detail, run_list, workers

sdk_routes = sdk.routes

health_urls = [
    path("health", health.live, name="health"),
    path("health/ready", health.ready, name="health-ready"),
]

page_urls: list[URLPattern] = [
    path("", run_list.home, name="home"),
    path("login/", login.password, name="login"),
    path("login/<str:token>/", login.link, name="login-link"),
    path("logout/", login.sign_out, name="logout"),
    path("runs/", run_list.run_list, name="run-list"),
    path("runs/<str:run_id>/", run_detail.run_detail, name="run-detail"),
    path("runs/<str:run_id>/panels/", run_detail.panels, name="run-panels"),
    path("runs/<str:run_id>/rename", run_detail.rename, name="run-rename"),
    path("runs/<str:run_id>/metrics.json", run_data.values, name="run-metrics"),
    path("runs/<str:run_id>/metrics.csv", run_data.as_csv, name="run-metrics-csv"),
    path("runs/<str:run_id>/series.json", run_data.series, name="run-series"),
    path(
        "runs/<str:run_id>/checkpoints/<str:kind>/<str:name>/download",
        checkpoints.download,
        name="checkpoint-download",
    ),
    path(
        "runs/<str:run_id>/checkpoints/<str:kind>/<str:name>/delete",
        checkpoints.delete,
        name="checkpoint-delete",
    ),
    path(
        "runs/<str:run_id>/checkpoints/<str:kind>/<str:name>/keep", checkpoints.keep, name="checkpoint-keep"
    ),
    path("checkpoints/", checkpoints.checkpoint_list, name="checkpoint-list"),
    path("checkpoints/delete", checkpoints.delete_many, name="checkpoint-delete-many"),
    path("workers/", workers.worker_list, name="worker-list"),
    path("settings/", account.settings_page, name="settings"),
    path("settings/keys/create", account.create_key, name="key-create"),
    path("settings/keys/<int:pk>/revoke", account.revoke_key, name="key-revoke"),
    path("settings/password", account.change_password, name="password-change"),
]

socket_routes: list[URLPattern] = [
    path("ws/runs/", consumers.RunListConsumer.as_asgi(), name="run-list-socket"),  # type: ignore[arg-type]
    path("ws/runs/<str:run_id>/", consumers.RunConsumer.as_asgi(), name="run-socket"),  # type: ignore[arg-type]
]
