"""The growing file of one upload: how much of it is there is its size. Knows no rows."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from runs.exceptions import ChecksumMismatch, NotFound, OffsetConflict, PayloadTooLarge, UploadBusy
from runs.services import blobs

CHECKSUMS: Final = ("sha1", "sha256", "sha512")


@dataclass(frozen=True, kw_only=True)
class Checksum:
    """What the bytes of one request must come to; `algorithm` is one of CHECKSUMS."""

    algorithm: str
    digest: bytes


class LockedPart:
    """An upload's file, open and locked: no other process or thread writes to it or takes it away.

    Raises:
        NotFound: there is no such file.
        UploadBusy: somebody else has it.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            raise NotFound("there is no such upload") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._fd).st_nlink == 0:  # deleted between the two calls
                raise NotFound("there is no such upload")
        except BlockingIOError:
            self.close()
            raise UploadBusy from None
        except BaseException:
            self.close()
            raise

    @property
    def size_bytes(self) -> int:
        """How much is there."""
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        """Let go of the lock; repeating it is no error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> LockedPart:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()


class PartWriter(LockedPart):
    """Appends the bytes of one request to an upload's file.

    Raises:
        NotFound: there is no such file.
        UploadBusy: somebody else writes to it.
        OffsetConflict: the file does not end at `offset`.
    """

    def __init__(self, path: Path, *, offset: int, end: int, checksum: Checksum | None) -> None:
        super().__init__(path)
        if self.size_bytes != offset:
            message = f"the upload is at byte {self.size_bytes}, not {offset}"
            self.close()
            raise OffsetConflict(message, place="upload-offset")
        self.offset = offset
        self._start = offset
        self._end = end
        self._checksum = checksum
        self._hash = hashlib.new(checksum.algorithm, usedforsecurity=False) if checksum else None

    def write(self, block: bytes) -> None:
        """Append some bytes.

        Raises:
            PayloadTooLarge: they go past the announced length; nothing of this request is kept.
            DiskFull: there is no room; what was written stays.
        """
        if self.offset + len(block) > self._end:
            self._cut()
            raise PayloadTooLarge(f"the upload was announced with {self._end} bytes; this is more")
        rest = memoryview(block)
        while rest:
            with blobs.room():
                written = os.pwrite(self._fd, rest, self.offset)
            self.offset += written
            rest = rest[written:]
        if self._hash is not None:
            self._hash.update(block)

    def keep(self, *, is_whole: bool) -> None:
        """Make durable what was written.

        Args:
            is_whole: all bytes of the request came; a part of them has no checksum and is cut off again.
        Raises:
            ChecksumMismatch: they are not what was sent; they are cut off again.
        """
        is_right = True
        if self._checksum is not None and self._hash is not None:
            is_right = is_whole and hmac.compare_digest(self._hash.digest(), self._checksum.digest)
        if not is_right:
            self._cut()
        os.fsync(self._fd)
        if not is_right and is_whole:
            raise ChecksumMismatch

    def _cut(self) -> None:
        os.ftruncate(self._fd, self._start)
        self.offset = self._start
