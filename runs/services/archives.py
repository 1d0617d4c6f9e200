"""A checkpoint's adapter as one file; as a tar also under an address that is its own permission for a quarter of an hour."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from django.core.signing import BadSignature, TimestampSigner

from runs.exceptions import NotFound
from runs.models import Checkpoint
from runs.services import checkpoints
from runs.services.sinks import Sink

LIFETIME_S: Final = 900
_CHUNK_BYTES: Final = 1 << 20
_signer = TimestampSigner(salt="checkpoint-archive")


def sign(checkpoint: Checkpoint) -> str:
    """Return a token that opens this checkpoint's archive for whoever has it."""
    return _signer.sign(str(checkpoint.pk))


def opened_by(token: str) -> Checkpoint:
    """Return the checkpoint that a token opens.

    Raises:
        NotFound: the token is not ours or too old, or the checkpoint was deleted.
    """
    try:
        pk = _signer.unsign(token, max_age=LIFETIME_S)
    except BadSignature as error:
        raise NotFound("this download address is not valid or no longer valid") from error
    checkpoint = Checkpoint.objects.filter(pk=pk).first()
    if checkpoint is None:
        raise NotFound("this checkpoint was deleted")
    return checkpoint


def tar(checkpoint: Checkpoint) -> Iterator[bytes]:
    """Yield a tar file of the adapter's files while they are read."""
    num_bytes = 2 * tarfile.BLOCKSIZE
    for name, file in checkpoints.files(checkpoint, with_optimizer=False):
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = file.size, int(checkpoint.created_at.timestamp()), 0o644
        # USTAR has no files of 8 GiB; with names as short as these both are one block.
        yield info.tobuf(tarfile.GNU_FORMAT)
        yield from file.chunks(_CHUNK_BYTES)
        padding = -info.size % tarfile.BLOCKSIZE
        yield bytes(padding)
        num_bytes += tarfile.BLOCKSIZE + info.size + padding
    # Two empty blocks end it, and POSIX wants the last record whole.
    yield bytes(2 * tarfile.BLOCKSIZE + -num_bytes % tarfile.RECORDSIZE)


def zipped(checkpoint: Checkpoint) -> Iterator[bytes]:
    """Yield a zip file of the adapter's files while they are read; weights do not get smaller, so as they are."""
    sink = Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name, file in checkpoints.files(checkpoint, with_optimizer=False):
            info = zipfile.ZipInfo(name, checkpoint.created_at.timetuple()[:6])
            info.external_attr = 0o644 << 16
            with archive.open(info, "w", force_zip64=True) as entry:
                for chunk in file.chunks(_CHUNK_BYTES):
                    entry.write(chunk)
                    yield sink.take()
    yield sink.take()


FORMATS: Final[Mapping[str, tuple[str, Callable[[Checkpoint], Iterator[bytes]]]]] = {
    "tar": ("application/x-tar", tar),
    "zip": ("application/zip", zipped),
}
