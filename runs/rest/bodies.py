"""Request bodies: JSON read strictly, files written to disk as they come, and what makes two bodies the same."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.core.files.uploadhandler import FileUploadHandler
from django.http import HttpRequest
from ninja.params.models import Body, BodyModel
from ninja.parser import Parser

from runs.exceptions import PayloadTooLarge, RequestInvalid, UnsupportedMedia
from runs.schemas.encodings import decompress
from runs.schemas.parsing import parse_json
from runs.services import blobs

JSON: Final = "application/json"
MULTIPART: Final = "multipart/form-data"
_FORM_FIELDS: Final = ("name", "description", "filename")
_CHUNK_BYTES: Final = 1 << 20


class JsonParser(Parser):
    """Reads JSON as the rest of the product does: with the place of each mistake, without NaN or doubled keys."""

    def parse_body(self, request: HttpRequest) -> Any:
        """Return the body's value."""
        if request.content_type != JSON:
            raise UnsupportedMedia(
                f"content-type {(request.content_type or '')[:80]!r} is not understood; use {JSON}"
            )
        encoding = request.headers.get("content-encoding")
        return parse_json(decompress(request.body, encoding, limit=settings.MAX_BODY_BYTES))


class _StrictBodyModel(BodyModel):
    @classmethod
    def resolve(cls, request: HttpRequest, api: Any, path_params: dict[str, Any]) -> Any:
        """Return the body; in JSON "1" is no number and 1 is not true."""
        data = cls.get_request_data(request, api, path_params)
        return cls() if data is None else cls.model_validate(data, strict=True)


class JsonBody(Body):  # type: ignore[misc] # Ninja's parameters are pydantic fields, which are final
    """Marks the parameter that is the JSON body."""

    _model = _StrictBodyModel

    @classmethod
    def _param_source(cls) -> str:
        return "body"


class Upload:
    """A file that came with a request, on disk; whoever keeps it moves it away, `close` deletes what is left."""

    def __init__(self, path: Path, filename: str, fields: Mapping[str, str], digest: str) -> None:
        self.path = path
        self.filename = filename
        self.fields = fields
        self.digest = digest

    def close(self) -> None:
        """Delete the file unless somebody moved it."""
        self.path.unlink(missing_ok=True)


def receive_upload(request: HttpRequest) -> Upload:
    """Write the request's file to disk: the whole body, or the part `file` of a form.

    Raises:
        RequestInvalid: there is none.
        PayloadTooLarge: it is larger than an upload may be.
        DiskFull: there is no room for it.
    """
    settings.TEMP_DIR.mkdir(parents=True, exist_ok=True)
    if request.content_type == MULTIPART:
        return _from_form(request)
    if request.content_type == "application/x-www-form-urlencoded":
        raise UnsupportedMedia(
            "send the file as the body with its own content type, or as the part `file` of multipart/form-data"
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UnsupportedMedia(
            f"content-encoding {encoding[:40]!r}: send the file as it is, a .gz file included"
        )
    return _from_body(request)


def digest_of(request: HttpRequest, upload: Upload | None) -> str:
    """Return what is the same for two requests that ask for the same."""
    sha = hashlib.sha256(f"{request.method} {request.get_full_path()}\0".encode())
    sha.update(request.body if upload is None else upload.digest.encode())
    return sha.hexdigest()


class _Incoming:
    """A file that is being written as it comes; after a failure nothing of it is left."""

    def __init__(self) -> None:
        # The file outlives this object: whoever keeps the upload moves it away.
        self.file = tempfile.NamedTemporaryFile(dir=settings.TEMP_DIR, prefix="rest-", delete=False)  # noqa: SIM115
        self._sha = hashlib.sha256()
        self.path = Path(self.file.name)
        self.size_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Append; refuse what is too large as soon as it is."""
        self.size_bytes += len(chunk)
        if self.size_bytes > settings.MAX_UPLOAD_BYTES:
            raise PayloadTooLarge(f"an upload has at most {settings.MAX_UPLOAD_BYTES} bytes")
        self._sha.update(chunk)
        with blobs.room():
            self.file.write(chunk)

    def finish(self, filename: str, fields: Mapping[str, str], *, place: str) -> Upload:
        """Return the whole file."""
        with blobs.room():
            self.file.close()
        if not self.size_bytes:
            raise RequestInvalid("is empty, a file was expected", place=place)
        self._sha.update(repr(sorted(fields.items())).encode())
        return Upload(self.path, filename, fields, self._sha.hexdigest())

    def discard(self) -> None:
        """Delete what came."""
        with suppress(OSError):  # its end found no room
            self.file.close()
        self.path.unlink(missing_ok=True)


class _FormFile(FileUploadHandler):
    """Takes the part `file` of a form, which Django would keep in a second file first."""

    chunk_size = _CHUNK_BYTES

    def __init__(self) -> None:
        super().__init__()
        self.incoming: _Incoming | None = None

    def new_file(self, field_name: str, *args: Any, **kwargs: Any) -> None:
        """Begin the file; there is one, under its name."""
        super().new_file(field_name, *args, **kwargs)
        if field_name != "file":
            raise _unknown_part(field_name)
        if self.incoming is not None:
            raise RequestInvalid("comes twice; send one file in a request", place="file")
        self.incoming = _Incoming()

    def receive_data_chunk(self, raw_data: bytes, start: int) -> None:
        """Append to the file."""
        assert self.incoming is not None
        self.incoming.write(raw_data)

    def file_complete(self, file_size: int) -> UploadedFile[bytes]:
        """Return what stands for the file among the parts."""
        assert self.incoming is not None
        return UploadedFile(self.incoming.file, name=self.file_name, size=file_size)

    def upload_interrupted(self) -> None:
        """Refuse a form that ends within its file."""
        raise RequestInvalid("the form ends before its file does", place="file")


def _from_body(request: HttpRequest) -> Upload:
    incoming = _Incoming()
    try:
        while chunk := request.read(_CHUNK_BYTES):
            incoming.write(chunk)
        fields = {name: request.GET[name] for name in _FORM_FIELDS if name in request.GET}
        return incoming.finish(fields.get("filename", "upload.jsonl"), fields, place="body")
    except BaseException:
        incoming.discard()
        raise


def _from_form(request: HttpRequest) -> Upload:
    taker = _FormFile()
    request.upload_handlers = [taker]
    try:
        found = request.FILES.get("file")
        unknown = sorted({*request.POST} - {*_FORM_FIELDS})
        if unknown:
            raise _unknown_part(unknown[0])
        if taker.incoming is None or not isinstance(found, UploadedFile):
            raise RequestInvalid("is missing: send the dataset as the form's part `file`", place="file")
        fields = {name: str(request.POST[name]) for name in _FORM_FIELDS if name in request.POST}
        filename = fields.get("filename") or found.name or "upload.jsonl"
        return taker.incoming.finish(filename, fields, place="file")
    except BaseException:
        if taker.incoming is not None:
            taker.incoming.discard()
        raise


def _unknown_part(name: str) -> RequestInvalid:
    return RequestInvalid(f"unknown part; the form takes file, {', '.join(_FORM_FIELDS)}", place=name[:80])
