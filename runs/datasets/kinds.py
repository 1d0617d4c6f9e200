"""Files that are not training data as such, recognised by their first bytes, and what to do with each."""

from __future__ import annotations

from typing import Final

from runs.datasets.problems import Problem

_SAVE: Final = "save the rows as JSONL (one JSON object a line), CSV or Parquet and upload that"
_UNPACK: Final = "unpack it and upload the data file inside; one file may be compressed with gzip or zstd"
_TABLE: Final = 'save the sheet as "CSV UTF-8" and upload that'
_PARQUET: Final = "write it as Parquet (`df.to_parquet`) or JSONL and upload that"
_TEXT: Final = "save its text as a UTF-8 .txt file, or rows as JSONL, and upload that"
_REPACK: Final = "unpack it, then upload it as it is or compressed with gzip or zstd"

# First bytes, what the file is, and the way out. Longer and rarer signs first.
_SIGNS: Final[tuple[tuple[bytes, str, str], ...]] = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself", "run `git lfs pull` and upload the real file"),
    (b"%PDF", "a PDF document", _TEXT),
    (b"{\\rtf", "an RTF document", _TEXT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document (xls, doc)", _TABLE),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"BZh", "a bzip2 file", _REPACK),
    (b"\xfd7zXZ\x00", "an xz file", _REPACK),
    (b"\x04\x22\x4d\x18", "an lz4 file", _REPACK),
    (b"\xff\x06\x00\x00sNaPpY", "a snappy file", _REPACK),
    (b"SQLite format 3\x00", "an SQLite database", _SAVE),
    (b"ARROW1", "an Arrow or Feather file", _PARQUET),
    (b"\xff\xff\xff\xff", "an Arrow stream", _PARQUET),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _PARQUET),
    (b"Obj\x01", "an Avro file", _PARQUET),
    (b"ORC", "an ORC file", _PARQUET),
    (b"\x93NUMPY", "a NumPy array", _SAVE),
    (b"GGUF", "a GGUF model, not data", _SAVE),
    (b"\x89PNG", "a PNG image", _SAVE),
    (b"\xff\xd8\xff", "a JPEG image", _SAVE),
    (b"GIF8", "a GIF image", _SAVE),
    (b"\x7fELF", "a program", _SAVE),
    (b"MZ\x90\x00", "a program", _SAVE),
)  # fmt: skip
_PICKLE_STARTS: Final = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


def refused_kind(head: bytes) -> Problem | None:
    """Return why a file that starts like this is refused, or None if it may be training data."""
    for sign, name, fix in _SIGNS:
        if head.startswith(sign) and _is_binary_sign(sign, head):
            return _refusal(name, fix)
    return _zip(head) or _other(head)


def _is_binary_sign(sign: bytes, head: bytes) -> bool:
    """Tell signs of plain letters (`ORC`, `BZh`) from a text that happens to start with them."""
    return len(sign) > 4 or not sign.isalpha() or any(byte < 9 for byte in head[len(sign) : len(sign) + 64])


def _zip(head: bytes) -> Problem | None:
    if not head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return None
    if b"xl/" in head:
        return _refusal("an Excel workbook (xlsx)", _TABLE)
    if b"word/" in head:
        return _refusal("a Word document (docx)", _TEXT)
    return _refusal("a zip archive", _UNPACK)


def _other(head: bytes) -> Problem | None:
    if head[257:262] == b"ustar":
        return _refusal("a tar archive", _UNPACK)
    if head.startswith(_PICKLE_STARTS):
        return _refusal("a Python pickle, which is never loaded because it can run code", _SAVE)
    start = head[:200].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return _refusal(
            "a web page", "it may be a login or error page saved in place of the data: download it again"
        )
    if start.startswith(b"<?xml"):
        return _refusal("an XML document", _SAVE)
    return None


def _refusal(name: str, fix: str) -> Problem:
    return Problem(code="unsupported_kind", reason=f"the file is {name}", fix=fix)
