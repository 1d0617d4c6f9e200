"""What processes that were killed have left behind: folders of datasets without a row, and temporary files."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import suppress
from typing import Final

from django.conf import settings
from django.core.files.storage import default_storage
from django.utils import timezone

from runs.models import DatasetVersion
from runs.services import blobs
from runs.services.datasets import FOLDER

logger = logging.getLogger(__name__)
# Nothing takes so long to be made and entered.
_STALE_S: Final = 2 * 86_400


def delete_dataset_folders() -> None:
    """Delete old folders of datasets that no row names; one that the storage fails at keeps none else."""
    try:
        folders, _ = default_storage.listdir(FOLDER)
    except FileNotFoundError:
        return
    names = {f"{FOLDER}/{name}" for name in folders}
    names -= set(DatasetVersion.objects.filter(directory__in=names).values_list("directory", flat=True))
    for name in filter(_is_stale, names):
        blobs.delete_folder(name)


def delete_temporary_files() -> None:
    """Delete what has lain in the folder of temporary files for long."""
    for path in settings.TEMP_DIR.glob("*"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - _STALE_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_stale(folder: str) -> bool:
    """Say whether a folder is so old that whoever made it is done."""
    try:
        with blobs.away():
            names = default_storage.listdir(folder)[1]
            ages = [timezone.now() - default_storage.get_modified_time(f"{folder}/{name}") for name in names]
    except OSError as error:
        logger.warning("the folder %s could not be looked at: %s", folder, error)
        return False
    return bool(ages) and min(ages).total_seconds() > _STALE_S
