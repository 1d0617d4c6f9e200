"""Django's entry for the `runs` application."""

from __future__ import annotations

from django.apps import AppConfig


class RunsConfig(AppConfig):
    """Runs, operations, checkpoints and the people who own them."""

    name = "runs"
    default_auto_field = "django.db.models.BigAutoField"
