"""The Django project: settings, addresses, the Celery application and start-up."""

from __future__ import annotations

from mintweb.celery import app as celery_app

__all__ = ["celery_app"]
