"""Opens an uploaded file as a stream of blocks, by its content: plain, gzip or zstd; text or Parquet.

Memory is flat whatever the file says about itself: blocks are small, the window of zstd is limited, and a
file that unpacks to far more than its size is refused before it is unpacked.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import zstandard

from runs.datasets import encodings
from runs.datasets.kinds import refused_kind
from runs.datasets.problems import FileRefused, Problem

HEAD_BYTES: Final = 64 * 2**10
BLOCK_BYTES: Final = 256 * 2**10
# One byte of zstd can stand for 32 KiB of output, all of which a single call returns: 16 MiB at most.
_ZSTD_INPUT_BYTES: Final = 512
_GZIP: Final = b"\x1f\x8b"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_GZIP_WINDOW: Final = 31
_ANEW: Final = "compress it again and compare the sizes before and after the upload"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a compressed file may cost.

    Args:
        ratio: unpacked bytes for each packed one, looked at once `free_bytes` have been unpacked.
        window_bytes: memory of the zstd decoder; 128 MiB is what `zstd --ultra -22` needs.
    """

    ratio: int = 100
    free_bytes: int = 32 * 2**20
    total_bytes: int = 64 * 2**30
    window_bytes: int = 128 * 2**20


def _ignore() -> None:
    """Take no notice."""


@dataclass(kw_only=True)
class Source:
    """A file that was looked at and can be read, several times, from its start.

    Args:
        compression: none, gzip or zstd.
        encoding: converted from this while reading; empty for UTF-8.
        head: the first bytes, unpacked and converted, without a byte order mark.
        num_read: packed bytes read by the newest `blocks()`.
        on_block: called before each block is handed out.
    """

    path: Path
    size_bytes: int
    compression: str
    encoding: str = ""
    limits: Limits = field(default_factory=Limits)
    head: bytes = b""
    is_parquet: bool = False
    num_read: int = 0
    on_block: Callable[[], None] = _ignore

    def blocks(self) -> Iterator[bytes]:
        """Yield the text as UTF-8 without its byte order mark.

        Raises:
            FileRefused: the compressed stream is cut off, damaged or a bomb.
        """
        raw = self._unpacked()
        blocks = encodings.convert(raw, self.encoding) if self.encoding else raw
        is_first = True
        for block in blocks:
            if is_first and block:
                is_first = False
                block = block.removeprefix(codecs.BOM_UTF8)
            self.on_block()
            yield block

    def _unpacked(self) -> Iterator[bytes]:
        self.num_read = 0
        with self.path.open("rb", buffering=0) as file:
            unpacked = 0
            for block in _UNPACKERS[self.compression](file, self.limits):
                unpacked += len(block)
                self.num_read = file.tell()
                if self.compression != "none":
                    self._refuse_bomb(unpacked)
                yield block

    def _refuse_bomb(self, unpacked: int) -> None:
        limits = self.limits
        if unpacked > limits.total_bytes:
            reason = f"the file unpacks to more than {limits.total_bytes // 2**30} GiB"
        elif unpacked > limits.free_bytes and unpacked > limits.ratio * self.num_read:
            reason = f"the file unpacks to more than {limits.ratio} times its size"
        else:
            return
        fix = "upload it uncompressed, without the repeated rows, or in several parts"
        raise FileRefused(Problem(code="bomb", reason=reason, fix=fix))


def open_source(path: Path, *, encoding: str = "", limits: Limits | None = None) -> Source:
    """Look at the first bytes of a file and return it ready to read.

    Raises:
        FileRefused: the file is empty, of another kind, binary, damaged, or not UTF-8 throughout.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(HEAD_BYTES)
    if not start:
        fix = "upload a file with at least one row; the export may have failed"
        raise FileRefused(Problem(code="empty_file", reason="the file is empty (0 bytes)", fix=fix))
    compression = _compression(start)
    source = Source(path=path, size_bytes=size_bytes, compression=compression, limits=limits or Limits())
    packed = start if compression == "none" else _head(source)
    _refuse_kind(packed, compression)
    source.is_parquet = packed.startswith((b"PAR1", b"PARE"))
    if not source.is_parquet:
        source.encoding = _encoding(packed, encoding)
        source.head = _head(source)
    return source


def _compression(start: bytes) -> str:
    if start.startswith(_GZIP):
        return "gzip"
    is_skippable = len(start) > 4 and start[1:4] == b"\x2a\x4d\x18" and 0x50 <= start[0] <= 0x5F
    return "zstd" if start.startswith(_ZSTD) or is_skippable else "none"


def _head(source: Source) -> bytes:
    head = b""
    for block in source.blocks():
        head += block
        if len(head) >= HEAD_BYTES:
            break
    return head[:HEAD_BYTES]


def _refuse_kind(head: bytes, compression: str) -> None:
    if problem := refused_kind(head):
        raise FileRefused(problem)
    if compression == "none":
        return
    if head.startswith((_GZIP, _ZSTD)):
        fix = "unpack it once and upload that"
        raise FileRefused(Problem(code="packed_twice", reason="the file is compressed twice", fix=fix))
    if head.startswith((b"PAR1", b"PARE")):
        reason = f"the file is a Parquet file inside {compression}"
        fix = "unpack it and upload the .parquet file, which is compressed already"
        raise FileRefused(Problem(code="packed_parquet", reason=reason, fix=fix))


def _encoding(head: bytes, wanted: str) -> str:
    """Return what to convert from, "" for UTF-8."""
    name = wanted.lower().replace("_", "-")
    if name in ("", "utf-8", "utf8", "utf-8-sig"):
        if wide := encodings.wide_encoding(head):
            raise encodings.wide_refusal(wide)
        if encodings.is_binary(head):
            fix = "upload text: JSONL, JSON, CSV, TSV, plain text; or Parquet"
            raise FileRefused(Problem(code="binary", reason="the file is binary, of no known kind", fix=fix))
        return ""
    return wanted


def _plain(file: BinaryIO, limits: Limits) -> Iterator[bytes]:
    while block := file.read(BLOCK_BYTES):
        yield block


def _gzip(file: BinaryIO, limits: Limits) -> Iterator[bytes]:
    decoder = zlib.decompressobj(_GZIP_WINDOW)
    rest = b""
    while data := rest or file.read(BLOCK_BYTES):
        if decoder.eof:
            # Members follow each other; `gzip` itself allows padding with zeros after the last one.
            rest = data.lstrip(b"\0")
            decoder = zlib.decompressobj(_GZIP_WINDOW) if rest else decoder
            continue
        try:
            yield decoder.decompress(data, BLOCK_BYTES)
        except zlib.error as error:
            raise _damaged("gzip", str(error)) from error
        rest = decoder.unused_data or decoder.unconsumed_tail
    if not decoder.eof:
        raise _cut_off("gzip")


def _zstd(file: BinaryIO, limits: Limits) -> Iterator[bytes]:
    unpacker = zstandard.ZstdDecompressor(max_window_size=limits.window_bytes)
    decoder = unpacker.decompressobj()
    for data in _small_inputs(file):
        while data:
            if decoder.eof:
                decoder = unpacker.decompressobj()
            try:
                unpacked = decoder.decompress(data)
            except zstandard.ZstdError as error:
                raise _damaged("zstd", str(error)) from error
            data = decoder.unused_data if decoder.eof else b""
            for start in range(0, len(unpacked), BLOCK_BYTES):
                yield unpacked[start : start + BLOCK_BYTES]
    if not decoder.eof:
        raise _cut_off("zstd")


def _small_inputs(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK_BYTES):
        for start in range(0, len(block), _ZSTD_INPUT_BYTES):
            yield block[start : start + _ZSTD_INPUT_BYTES]


def _damaged(name: str, detail: str) -> FileRefused:
    reason = f"the {name} stream is damaged ({detail.strip()[:120]})"
    if "memory" in detail or "window" in detail.lower():
        reason = f"the {name} stream needs a larger window than 128 MiB"
        return FileRefused(
            Problem(
                code="window", reason=reason, fix="compress it with `zstd` without `--long`, or with gzip"
            )
        )
    return FileRefused(Problem(code="damaged_stream", reason=reason, fix=_ANEW))


def _cut_off(name: str) -> FileRefused:
    reason = f"the {name} stream ends too early: the file was cut off"
    return FileRefused(Problem(code="truncated_stream", reason=reason, fix=_ANEW))


_UNPACKERS: Final[dict[str, Callable[[BinaryIO, Limits], Iterator[bytes]]]] = {
    "none": _plain,
    "gzip": _gzip,
    "zstd": _zstd,
}
