#!/usr/bin/env python
"""Django's command line for mintweb; a wrong setting ends it with one sentence instead of a traceback."""

from __future__ import annotations

import os
import sys

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management import execute_from_command_line


def main() -> None:
    """Check the settings, then hand over to Django."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mintweb.settings")
    try:
        settings.INSTALLED_APPS  # noqa: B018 - the first access reads all settings
    except ImproperlyConfigured as error:
        sys.stderr.write(f"mintweb: {error}\n")
        sys.exit(2)
    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
