"""The Celery application: doorbells between the web and the workers (settings under CELERY_)."""

from __future__ import annotations

import logging.config
import os
from typing import Any

from celery import Celery
from celery.signals import setup_logging

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mintweb.settings")

app = Celery("mintweb")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@setup_logging.connect
def use_our_logging(**_: Any) -> None:
    """Keep Celery from installing its own log handlers."""
    from django.conf import settings

    logging.config.dictConfig(settings.LOGGING)
