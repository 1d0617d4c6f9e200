"""Undoes a request's Content-Encoding in a stream, with a hard limit on what comes out."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Iterator

import zstandard

from runs.exceptions import PayloadTooLarge, RequestInvalid, UnsupportedMedia

MAX_RATIO = 100
RATIO_FREE_BYTES = 1 << 20
# What RFC 8878 asks every decoder to support; a larger window would be memory spent on one header.
MAX_ZSTD_WINDOW_BYTES = 8 << 20
# More frames than any client sends, and each costs a new decompressor.
MAX_FRAMES = 64
_PIECE_BYTES = 256 << 10
# A zstd block of 4 bytes can unpack to 128 KiB: one piece is at most 8 MiB.
_ZSTD_PIECE_BYTES = 256

SUPPORTED = ("gzip", "deflate", "zstd", "identity")


def decompress(body: bytes, encoding: str | None, *, limit: int) -> bytes:
    """Return the plain body.

    Args:
        encoding: the Content-Encoding header, or None.
        limit: most bytes the plain body may have.
    Raises:
        PayloadTooLarge: more than `limit` bytes, or more than 1 MiB at a ratio above 100.
        UnsupportedMedia: an unknown encoding, or more than one.
        RequestInvalid: the compressed bytes are damaged or cut off.
    """
    name = _single_encoding(encoding)
    if name == "identity":
        if len(body) > limit:
            raise PayloadTooLarge(f"the body has {len(body)} bytes, the limit is {limit}")
        return body
    try:
        return _collect(_pieces(body, name), limit=limit, num_packed=len(body))
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise RequestInvalid(f"the body is not valid {name}: {error}") from error


def beginning(body: bytes, encoding: str, *, num_bytes: int) -> bytes:
    """Return the first bytes of the plain body, as many as can be told of one that is damaged, cut off or too large."""
    plain = bytearray()
    with contextlib.suppress(UnsupportedMedia, zlib.error, zstandard.ZstdError, EOFError):
        for piece in _pieces(body, _single_encoding(encoding)):
            plain += piece[:num_bytes]
            if len(plain) >= num_bytes:
                break
    return bytes(plain[:num_bytes])


def _pieces(body: bytes, name: str) -> Iterator[bytes]:
    if name == "identity":
        return iter([body])
    return _unzstd(body) if name == "zstd" else _inflate(body, name)


def _single_encoding(encoding: str | None) -> str:
    names = [name.strip().lower() for name in (encoding or "identity").split(",")]
    names = [name for name in names if name not in ("", "identity")]
    if len(names) > 1:
        raise UnsupportedMedia(f"the body was encoded {len(names)} times; use one content-encoding")
    name = names[0] if names else "identity"
    name = "gzip" if name == "x-gzip" else name
    if name not in SUPPORTED:
        raise UnsupportedMedia(
            f"content-encoding {name[:40]!a} is not understood; use one of {', '.join(SUPPORTED)}"
        )
    return name


def _collect(pieces: Iterator[bytes], *, limit: int, num_packed: int) -> bytes:
    plain = io.BytesIO()
    ratio_limit = max(RATIO_FREE_BYTES, MAX_RATIO * num_packed)
    for piece in pieces:
        plain.write(piece)
        if plain.tell() > limit:
            raise PayloadTooLarge(f"the body unpacks to more than {limit} bytes")
        if plain.tell() > ratio_limit:
            raise PayloadTooLarge(
                f"the body unpacks to more than {MAX_RATIO} times its {num_packed} compressed bytes"
            )
    return plain.getvalue()


def _unzstd(body: bytes) -> Iterator[bytes]:
    # A decompressor fed by pieces stops when we do; decompress(max_output_size=...) ignores its limit
    # when the frame header declares a size, and the stream reader cannot tell a frame that is cut off.
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
    rest = memoryview(body)
    for _ in range(MAX_FRAMES):
        frame = decompressor.decompressobj()
        num_fed = 0
        while not frame.eof:
            piece = rest[num_fed : num_fed + _ZSTD_PIECE_BYTES]
            if not piece:
                raise EOFError("it is cut off")
            yield frame.decompress(piece)
            num_fed += len(piece)
        rest = rest[num_fed - len(frame.unused_data) :]
        if not rest:
            return
    raise EOFError(f"it has more than {MAX_FRAMES} frames")


def _inflate(body: bytes, name: str) -> Iterator[bytes]:
    window_bits = zlib.MAX_WBITS | 16 if name == "gzip" else _deflate_window_bits(body)
    rest = memoryview(body)
    for _ in range(MAX_FRAMES):
        stream = zlib.decompressobj(window_bits)
        num_fed = 0
        while not stream.eof:
            piece = rest[num_fed : num_fed + _PIECE_BYTES]
            plain = stream.decompress(piece, _PIECE_BYTES)
            if not piece and not plain:
                raise EOFError("it is cut off")
            yield plain
            num_fed += len(piece) - len(stream.unconsumed_tail or stream.unused_data)
        rest = rest[num_fed:]
        if not rest:
            return
    raise EOFError(f"it has more than {MAX_FRAMES} members")


def _deflate_window_bits(body: bytes) -> int:
    """Tell zlib-wrapped deflate, which the standard means, from the raw kind some clients send."""
    wrapped = len(body) >= 2 and body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS
