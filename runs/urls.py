"""Table of contents: every route of the product and, beside each, who may use it.

An SDK route's policy is its endpoint's `needs_key`; a page's is its view's `policy`; tests walk
these lists and fail on a route without one.
"""

from __future__ import annotations

from typing import Any, cast

from django.urls import URLPattern, path

from runs import consumers
from runs.api import sdk, uploads
from runs.pages import (
    account,
    checkpoint_list,
    checkpoints,
    compare,
    dataset_files,
    dataset_list,
    datasets,
    film_strip,
    health,
    lineage,
    login,
    new_run,
    playground,
    run_data,
    run_detail,
    run_list,
    steering,
    workers,
)
from runs.playground_consumer import PlaygroundConsumer
from runs.rest import api as rest
from runs.run_list_consumer import RunListConsumer

sdk_routes = sdk.routes
rest_urls = rest.urls

# Under /datasets/uploads/ for the pages and, the same, under /rest/v1/uploads/ for scripts.
upload_routes: list[URLPattern] = [
    path("", cast(Any, uploads.collection)),
    path("<str:upload_id>", cast(Any, uploads.single)),
]

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
    path("runs/new/", new_run.new_run, name="run-new"),
    path("runs/new/preview", new_run.preview, name="run-new-preview"),
    path("runs/new/import", new_run.read_file, name="run-new-import"),
    path("runs/new/export", new_run.write_file, name="run-new-export"),
    path("runs/delete", run_list.delete_many, name="run-delete-many"),
    path("runs/try", new_run.try_it, name="run-try"),
    path("runs/compare/", compare.compare, name="run-compare"),
    path("runs/compare/panels/", compare.panels, name="run-compare-panels"),
    path("runs/compare/metrics.csv", compare.as_csv, name="run-compare-csv"),
    path("runs/<str:run_id>/", run_detail.run_detail, name="run-detail"),
    path("runs/<str:run_id>/panels/", run_detail.panels, name="run-panels"),
    path("runs/<str:run_id>/rename", run_detail.rename, name="run-rename"),
    path("runs/<str:run_id>/delete", run_detail.delete, name="run-delete"),
    path("runs/<str:run_id>/metrics.json", run_data.values, name="run-metrics"),
    path("runs/<str:run_id>/metrics.csv", run_data.as_csv, name="run-metrics-csv"),
    path("runs/<str:run_id>/series.json", run_data.series, name="run-series"),
    path("runs/<str:run_id>/ancestry.json", lineage.ancestry, name="run-ancestry"),
    path("runs/<str:run_id>/film_strip/", film_strip.film_strip, name="run-film-strip"),
    path("runs/<str:run_id>/settings.yaml", steering.export, name="run-settings-yaml"),
    path("runs/<str:run_id>/pause", steering.pause, name="run-pause"),
    path("runs/<str:run_id>/resume", steering.resume, name="run-resume"),
    path("runs/<str:run_id>/stop", steering.stop, name="run-stop"),
    path("runs/<str:run_id>/save", steering.save, name="run-save"),
    path("runs/<str:run_id>/change", steering.change, name="run-change"),
    path("runs/<str:run_id>/extend", steering.extend, name="run-extend"),
    path("runs/<str:run_id>/retry", steering.retry, name="run-retry"),
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
    path("datasets/", dataset_list.dataset_list, name="dataset-list"),
    path("datasets/example", dataset_list.take_example, name="dataset-example"),
    path("datasets/<str:dataset_id>/", datasets.dataset_detail, name="dataset-detail"),
    path("datasets/<str:dataset_id>/edit", datasets.edit, name="dataset-edit"),
    path("datasets/<str:dataset_id>/delete", datasets.delete, name="dataset-delete"),
    path("datasets/<str:dataset_id>/<int:number>/original", dataset_files.original, name="dataset-original"),
    path("datasets/<str:dataset_id>/<int:number>/bad_rows", dataset_files.bad_rows, name="dataset-bad-rows"),
    path("datasets/<str:dataset_id>/<int:number>/skip", datasets.skip, name="dataset-skip"),
    path("datasets/<str:dataset_id>/<int:number>/columns", datasets.choose_columns, name="dataset-columns"),
    path(
        "datasets/<str:dataset_id>/<int:number>/encoding", datasets.choose_encoding, name="dataset-encoding"
    ),
    path("datasets/<str:dataset_id>/<int:number>/check", datasets.check_again, name="dataset-check"),
    path("checkpoints/", checkpoint_list.checkpoint_list, name="checkpoint-list"),
    path("checkpoints/delete", checkpoints.delete_many, name="checkpoint-delete-many"),
    path("playground/", playground.playground, name="playground"),
    path("playground/weights.json", playground.weights, name="playground-weights"),
    path("workers/", workers.worker_list, name="worker-list"),
    path("workers/<int:pk>/drain", workers.drain, name="worker-drain"),
    path("workers/<int:pk>/resume", workers.resume, name="worker-resume"),
    path("settings/", account.settings_page, name="settings"),
    path("settings/keys/create", account.create_key, name="key-create"),
    path("settings/keys/<int:pk>/revoke", account.revoke_key, name="key-revoke"),
    path("settings/password", account.change_password, name="password-change"),
]

socket_routes: list[URLPattern] = [
    path("ws/runs/", RunListConsumer.as_asgi(), name="run-list-socket"),  # type: ignore[arg-type]
    path("ws/playground/", PlaygroundConsumer.as_asgi(), name="playground-socket"),  # type: ignore[arg-type]
    path("ws/runs/<str:run_id>/", consumers.RunConsumer.as_asgi(), name="run-socket"),  # type: ignore[arg-type]
]
