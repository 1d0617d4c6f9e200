"""Which encoding a text is written in: UTF-8 is read, everything else is named so that it can be converted."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import Final

from runs.datasets.problems import FileRefused, Problem, excerpt_of

_BOMS: Final = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SAMPLE_BYTES: Final = 4096
_HIGH_RUN: Final = re.compile(rb"[\x80-\xff]+")
_KANA: Final = re.compile("[\\u3040-\\u30ff]{2}")
# Other bytes below a space never stand in a text.
_TEXT_CONTROLS: Final = frozenset(b"\t\n\r\x0b\x0c\x1b\x08\x1a")
_MAX_CONTROL_SHARE: Final = 0.02


def wide_encoding(head: bytes) -> str:
    """Return the UTF-16 or UTF-32 the head is written in, by its byte order mark or its NULs, else ""."""
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    sample = head[:_SAMPLE_BYTES]
    length = max(1, len(sample) // 4)
    shares = [sample[start::4].count(0) / length for start in range(4)]
    if len(sample) < 8 or max(shares) < 0.4:
        return ""
    if min(shares[1:]) > 0.9:
        return "utf-32-le"
    if min(shares[:3]) > 0.9:
        return "utf-32-be"
    if min(shares[1], shares[3]) > 0.4 and max(shares[0], shares[2]) < 0.1:
        return "utf-16-le"
    return "utf-16-be" if min(shares[0], shares[2]) > 0.4 and max(shares[1], shares[3]) < 0.1 else ""


def is_binary(head: bytes) -> bool:
    """Return whether the head holds so many control bytes that it is no text in any encoding."""
    sample = head[:_SAMPLE_BYTES]
    num_controls = sum(byte < 32 and byte not in _TEXT_CONTROLS for byte in sample)
    return num_controls > _MAX_CONTROL_SHARE * len(sample) + 1


def guess_encoding(raw: bytes) -> str:
    """Return the likeliest encoding of bytes that are not UTF-8, "" if they look like damage.

    Bytes above 127 come in runs of whole pairs in GB18030, singly in Western text (Latin-1, Windows-1252)
    and in runs of any length in Cyrillic text.
    """
    runs = _HIGH_RUN.findall(raw[: 16 * _SAMPLE_BYTES])
    num_high = sum(map(len, runs))
    in_runs = sum(len(run) for run in runs if len(run) > 1) / max(1, num_high)
    if _KANA.search(_decoded_or_empty(raw, "shift_jis")):
        return "shift_jis"
    if in_runs > 0.7:
        names = ("gb18030", "big5", "euc_kr")
        return next((name for name in names if _decoded_or_empty(raw, name)), "cp1251")
    if b"\xff" in raw or b"\xfe" in raw or b"\xc0" in raw or b"\xc1" in raw:
        return ""
    return "cp1252" if any(0x80 <= byte < 0xA0 for byte in b"".join(runs)) else "latin-1"


def _decoded_or_empty(raw: bytes, name: str) -> str:
    try:
        return codecs.getincrementaldecoder(name)().decode(raw[: 16 * _SAMPLE_BYTES])
    except UnicodeDecodeError:
        return ""


def wide_refusal(name: str) -> FileRefused:
    """Return the refusal of a file in UTF-16 or UTF-32."""
    pretty = name.upper()
    return FileRefused(
        Problem(
            code="not_utf8",
            reason=f"the file is written in {pretty}, not UTF-8",
            fix=f"save it as UTF-8 (`iconv -f {pretty} -t UTF-8 old > new`), or have it converted from {name}",
            line=1,
            column=1,
            encoding=name,
        )
    )


def not_utf8(raw: bytes, error: UnicodeDecodeError, line: int) -> Problem:
    """Return the problem of a line that is not UTF-8, with the character where it stops being that."""
    before = raw[: error.start].decode("utf-8", "replace")
    name = guess_encoding(raw)
    looks = f"; the line looks like {name.upper()}" if name else ""
    source = name.upper() if name else "its encoding"
    convert = f" (`iconv -f {source} -t UTF-8 old > new`), or have it converted from {name}" if name else ""
    return Problem(
        code="not_utf8",
        reason=f"byte 0x{raw[error.start]:02X} is not UTF-8{looks}",
        fix=f"save the file as UTF-8{convert}"
        if name
        else "save the file as UTF-8, or mend or delete this line",
        line=line,
        column=len(before) + 1,
        excerpt=excerpt_of(raw.decode("utf-8", "replace"), len(before)),
        encoding=name,
    )


def convert(blocks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """Yield the blocks as UTF-8.

    Raises:
        FileRefused: the encoding is not known, or a byte does not belong to it.
    """
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError:
        fix = "choose one of utf-16, utf-32, gb18030, cp1252, latin-1, shift_jis, big5, euc_kr, cp1251"
        reason = f"there is no text encoding {encoding!r}"
        raise FileRefused(Problem(code="unknown_encoding", reason=reason, fix=fix)) from None
    line = 1
    for block in blocks:
        text = _decoded(decoder, block, encoding, line, final=False)
        line += text.count("\n")
        yield text.encode("utf-8", "surrogatepass")
    yield _decoded(decoder, b"", encoding, line, final=True).encode("utf-8", "surrogatepass")


def _decoded(
    decoder: codecs.IncrementalDecoder, block: bytes, encoding: str, line: int, *, final: bool
) -> str:
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raw = error.object[: error.start]
        line += raw.decode(encoding, "replace").count("\n")
        byte = error.object[error.start]
        reason = f"byte 0x{byte:02X} is not {encoding}"
        fix = "the file is in another encoding, or damaged here: save it as UTF-8"
        raise FileRefused(Problem(code="not_in_encoding", reason=reason, fix=fix, line=line)) from error
