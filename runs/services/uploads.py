"""Uploads on their way, by the tus protocol: begin, append, finish, cancel, expire.

The file's size is the truth of how far an upload is; an upload that is complete becomes a dataset version.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from django.conf import settings
from django.db.models import QuerySet
from django.db.models.functions import Now
from django.utils import timezone

from runs.exceptions import DiskFull, NotFound, OffsetConflict, PayloadTooLarge, RequestInvalid, UploadBusy
from runs.models import Dataset, Upload, User
from runs.services import access, datasets
from runs.services.upload_files import Checksum, LockedPart, PartWriter

logger = logging.getLogger(__name__)
MAX_UNFINISHED: Final = 100
_SUFFIX: Final = ".part"
# A finished upload is remembered for as long as its client may ask what became of it.
_REMEMBERED_S: Final = 86_400
_SPARE_BYTES: Final = 256 * 2**20
_ORPHAN_S: Final = 3600
# In the metadata of an upload whose file has become a version, which may be deleted again.
_IS_KNOWN: Final = "is_known"
# A complete file that the storage refuses is hashed again only after such a time, doubled each time.
_REST_S: Final = 60
_MAX_DOUBLINGS: Final = 6


def create(user: User, *, size_bytes: int, metadata: Mapping[str, str]) -> Upload:
    """Begin an upload.

    Args:
        metadata: `filename`, and if wanted the `name` and `description` of a new dataset, or the
            `dataset` that gets a new version.
    Raises:
        PayloadTooLarge: the file is larger than this server takes.
        DiskFull: there is no room for it beside the uploads that are on their way.
        RequestInvalid: it is empty, or the user has too many unfinished uploads.
        NotFound: the dataset is not there.
    """
    _check_size(size_bytes)
    if _unfinished(access.uploads_of(user)).count() >= MAX_UNFINISHED:
        raise RequestInvalid(f"you have {MAX_UNFINISHED} unfinished uploads; finish or delete one first")
    dataset = access.get_dataset(user, metadata["dataset"]) if metadata.get("dataset") else None
    check_space(size_bytes)
    public_id = f"up-{secrets.token_hex(16)}"
    path = _path(public_id)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        return Upload.objects.create(
            public_id=public_id,
            owner=user,
            dataset=dataset,
            filename=datasets.printable(metadata.get("filename", ""))[-255:] or "data",
            size_bytes=size_bytes,
            metadata={name: metadata.get(name, "").replace("\0", "") for name in ("name", "description")},
            expires_at=_expiry(),
        )
    except BaseException:
        path.unlink()
        raise


def begin(upload: Upload, *, offset: int, length: int | None, checksum: Checksum | None) -> PartWriter:
    """Return a writer that appends to an upload; close it in the end.

    Args:
        length: how many bytes will come, if that is known.
    Raises:
        NotFound, UploadBusy, OffsetConflict: see `PartWriter`.
        PayloadTooLarge: more bytes will come than were announced.
    """
    if upload.version_id is not None:
        raise OffsetConflict("this upload is finished", place="upload-offset")
    writer = PartWriter(_path(upload.public_id), offset=offset, end=upload.size_bytes, checksum=checksum)
    if length is not None and offset + length > upload.size_bytes:
        writer.close()
        raise PayloadTooLarge(
            f"the upload was announced with {upload.size_bytes} bytes; {length} more from {offset} on are too many"
        )
    return writer


def end(upload: Upload, writer: PartWriter, *, is_whole: bool) -> Upload:
    """Make durable what was appended, and if the file is complete, a dataset version of it.

    Raises:
        ChecksumMismatch: what was appended is not what was sent; it is cut off again.
    """
    writer.keep(is_whole=is_whole)
    upload.expires_at = _expiry()
    Upload.objects.filter(pk=upload.pk).update(expires_at=upload.expires_at)
    if writer.offset == upload.size_bytes:
        _register(upload)
    return upload


def settle(upload: Upload) -> int:
    """Return how many bytes are there; a complete file whose end was lost becomes a version now.

    Raises:
        NotFound: the file is gone.
    """
    if upload.version_id is not None:
        return upload.size_bytes
    try:
        size_bytes = _path(upload.public_id).stat().st_size
    except FileNotFoundError:
        raise NotFound(f"there is no upload {upload.public_id}") from None
    if size_bytes == upload.size_bytes:
        with suppress(UploadBusy), LockedPart(_path(upload.public_id)):
            upload.refresh_from_db()
            if upload.version_id is None:
                _register(upload)
    return size_bytes


def cancel(upload: Upload) -> None:
    """Delete an upload with what is there of its file.

    Raises:
        UploadBusy: somebody is writing to it.
    """
    with suppress(NotFound), LockedPart(_path(upload.public_id)):
        _path(upload.public_id).unlink()
    Upload.objects.filter(pk=upload.pk).delete()


def unfinished(user: User) -> list[tuple[Upload, int]]:
    """Return the user's uploads that can be gone on with, and how many bytes of each are there."""
    rows = _unfinished(access.uploads_of(user)).filter(expires_at__gt=Now()).select_related("dataset")
    sizes = [(upload, _size_of(upload)) for upload in rows]
    return [(upload, size) for upload, size in sizes if size is not None]


def clean_up() -> None:
    """Finish what was left complete, and delete what has expired or was deleted, and files that no row names."""
    Upload.objects.filter(version=None, metadata__has_key=_IS_KNOWN).delete()
    for upload in _unfinished(Upload.objects.all()):
        if _size_of(upload) == upload.size_bytes and upload.metadata.get("rests_until", 0) <= time.time():
            _finish(upload)
    for upload in Upload.objects.filter(expires_at__lte=Now()):
        with suppress(UploadBusy):
            cancel(upload)
    for path in _folder().glob(f"*{_SUFFIX}"):
        with suppress(FileNotFoundError):
            is_old = path.stat().st_mtime < time.time() - _ORPHAN_S
            if is_old and not Upload.objects.filter(public_id=path.stem).exists():
                path.unlink()


def _unfinished(uploads: QuerySet[Upload]) -> QuerySet[Upload]:
    """Leave out those that have become versions, be they deleted by now."""
    return uploads.filter(version=None).exclude(metadata__has_key=_IS_KNOWN)


def _finish(upload: Upload) -> None:
    """Make a version of a complete file; what keeps it from that is nobody else's problem."""
    tries = upload.metadata.get("tries", 0)
    rest_s = _REST_S << min(tries, _MAX_DOUBLINGS)
    # Entered before the try, which may end its process.
    resting = {**upload.metadata, "tries": tries + 1, "rests_until": time.time() + rest_s}
    Upload.objects.filter(pk=upload.pk, version=None).update(metadata=resting)
    try:
        with suppress(NotFound):
            settle(upload)
    except Exception:
        logger.exception("upload %s could not be finished; it is tried again in %s s", upload, rest_s)


def _register(upload: Upload) -> None:
    """Make a version of the complete file; whoever calls this holds its lock."""
    path = _path(upload.public_id)
    try:
        dataset = upload.dataset
    except Dataset.DoesNotExist:
        raise NotFound("the dataset was deleted meanwhile") from None
    found = datasets.register(
        upload.owner,
        path=path,
        filename=upload.filename,
        dataset=dataset,
        name=upload.metadata.get("name", ""),
        description=upload.metadata.get("description", ""),
    )
    upload.version = found.version
    upload.metadata[_IS_KNOWN] = found.is_known
    expires_at = Now() + timedelta(seconds=_REMEMBERED_S)
    Upload.objects.filter(pk=upload.pk).update(
        version=found.version, metadata=upload.metadata, expires_at=expires_at
    )
    path.unlink()


def _check_size(size_bytes: int) -> None:
    if size_bytes == 0:
        raise RequestInvalid("the file is empty (0 bytes)", place="upload-length")
    if size_bytes > settings.MAX_UPLOAD_BYTES:
        raise PayloadTooLarge(f"the file has {size_bytes} bytes; the most is {settings.MAX_UPLOAD_BYTES}")


def check_space(size_bytes: int, *, here_bytes: int = 0) -> None:
    """Refuse a file that would not fit, counting the rows made from it and what other uploads still bring.

    Args:
        here_bytes: what of it is on the disk already.
    Raises:
        DiskFull: it would not.
    """
    others = ((upload, _size_of(upload)) for upload in _unfinished(Upload.objects.all()))
    promised = sum(upload.size_bytes - here for upload, here in others if here is not None)
    free = shutil.disk_usage(settings.DATA_DIR).free + here_bytes - promised - _SPARE_BYTES
    if free < 2 * size_bytes:
        raise DiskFull(
            f"the file and the rows made from it need {2 * size_bytes} bytes, "
            f"and the server has {max(free, 0)} bytes to spare"
        )


def _size_of(upload: Upload) -> int | None:
    with suppress(FileNotFoundError):
        return _path(upload.public_id).stat().st_size
    return None


def _expiry() -> datetime:
    return timezone.now() + timedelta(seconds=settings.UPLOAD_EXPIRES_S)


def _folder() -> Path:
    return Path(settings.DATA_DIR / "uploads")


def _path(public_id: str) -> Path:
    return _folder() / f"{public_id}{_SUFFIX}"
