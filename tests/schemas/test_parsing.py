"""Bodies that are damaged, hostile or simply not JSON are refused in words, at a place."""

from __future__ import annotations

import gzip
import json
import resource
import zlib
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from runs.exceptions import MintError, PayloadTooLarge, RequestInvalid, UnsupportedMedia
from runs.schemas.parsing import decompress, parse_json, validate
from runs.schemas.requests import CreateModel, CreateSession, LoadWeights, RetrieveFuture

LIMIT_BYTES = 64 << 20


def zstd(body: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(body)


def zstd_without_size(body: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return compressor.compress(body) + compressor.flush()


def raw_deflate(body: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(body) + compressor.flush()


PACKERS: list[Any] = [
    pytest.param("gzip", gzip.compress, id="gzip"),
    pytest.param("deflate", zlib.compress, id="deflate"),
    pytest.param("deflate", raw_deflate, id="raw-deflate"),
    pytest.param("zstd", zstd, id="zstd"),
    pytest.param("ZSTD", zstd_without_size, id="zstd-without-size"),
]


@pytest.mark.parametrize(("encoding", "pack"), PACKERS)
def test_it_unpacks(encoding: str, pack: Any) -> None:
    body = json.dumps(list(range(200_000))).encode()
    assert decompress(pack(body), encoding, limit=LIMIT_BYTES) == body


@pytest.mark.parametrize("encoding", [None, "", "identity"])
def test_it_passes_a_plain_body_on(encoding: str | None) -> None:
    assert decompress(b"{}", encoding, limit=2) == b"{}"
    with pytest.raises(PayloadTooLarge):
        decompress(b"{} ", encoding, limit=2)


@pytest.mark.parametrize(("encoding", "pack"), PACKERS)
def test_it_stops_at_the_limit(encoding: str, pack: Any) -> None:
    with pytest.raises(PayloadTooLarge, match="unpacks to more than 999"):
        decompress(pack(b"x" * 1000), encoding, limit=999)


@pytest.mark.parametrize(("encoding", "pack"), PACKERS)
def test_it_stops_a_bomb_early(encoding: str, pack: Any) -> None:
    bomb = pack(bytes(200 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PayloadTooLarge):
        decompress(bomb, encoding, limit=LIMIT_BYTES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize(("encoding", "pack"), PACKERS)
def test_it_refuses_a_body_that_is_cut_off(encoding: str, pack: Any) -> None:
    packed = pack(bytes(range(256)) * 100)
    for end in (0, 1, 5, len(packed) // 2, len(packed) - 1):
        with pytest.raises(RequestInvalid, match="not valid"):
            decompress(packed[:end], encoding, limit=LIMIT_BYTES)


def test_it_refuses_endless_frames() -> None:
    with pytest.raises(RequestInvalid, match="more than 64 frames"):
        decompress(zstd(b"") * 100, "zstd", limit=LIMIT_BYTES)


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "zstd,gzip", "\x00", "compress"])
def test_it_refuses_other_encodings(encoding: str) -> None:
    with pytest.raises(UnsupportedMedia):
        decompress(b"{}", encoding, limit=LIMIT_BYTES)


BAD_JSON = [
    (b"", "body is empty", ""),
    (b" \r\n", "body is empty", ""),
    (b'{"a": 1,\n "b": }', "expecting value", "line 2, column 7"),
    (b'{"a": 1,}', "not valid JSON", "line 1, column 9"),
    (b'{"a": "x', "unterminated string", "line 1, column 7"),
    (b"{} {}", "extra data", "line 1, column 4"),
    (b'{"a": NaN}', "NaN is not a JSON number", "line 1, column 7"),
    (b'{"a": -Infinity}', "-Infinity is not a JSON number", "line 1, column 7"),
    (b'{"a": 1e999}', "1e999 is too large", "line 1, column 7"),
    (b'{"a": [1,\n 1E+400]}', "is too large", "line 2, column 2"),
    (b"9" * 5000, "5000 characters", "line 1, column 1"),
    (b'{"a": 1, "a": 2}', "the key 'a' twice", ""),
    (b'{"a": [{"b": 1, "b": 1}]}', "the key 'b' twice", ""),
    (b"[" * 100_000, "nested more than 64", "line 1, column 65"),
    (b'{"a":' * 65 + b"1" + b"}" * 65, "nested more than 64", "line 1, column 321"),
    (b'{"a": "\\ud800"}', "half a surrogate pair", "line 1, column 8"),
    (b'{"a": "\\ud800x\\udc00"}', "half a surrogate pair", "line 1, column 8"),
    (b'{"a": "\\u0000"}', "NUL", "line 1, column 8"),
    (b'{"a": "\x00"}', "control character", "line 1, column 8"),
    (b'{"a": "\xff"}', "0xff is not valid UTF-8", "line 1, column 8"),
    (b"\xef\xbb\xbf{}", "byte order mark", "line 1, column 1"),
    ("{}".encode("utf-16"), "UTF-16", "line 1, column 1"),
    ("{}".encode("utf-16-be"), "UTF-16", "line 1, column 1"),
    ('{"é": x}'.encode(), "expecting value", "line 1, column 7"),
]


@pytest.mark.parametrize(("body", "rule", "place"), BAD_JSON)
def test_it_names_what_is_wrong_with_json(body: bytes, rule: str, place: str) -> None:
    with pytest.raises(RequestInvalid, match=rule) as caught:
        parse_json(body)
    assert caught.value.place == place
    assert str(caught.value).isascii()


GOOD_JSON = [
    b'{"a": "1e999 NaN [[[ \\\\ud800 \\\\u0000 {\\"a\\": 1, \\"a\\": 2}"}',
    b'{"a": 1e-999, "b": -0.5e+02, "N": "I", "\\ud83d\\ude00": null}',
    b"[" * 64 + b"]" * 64,
    b'{"a": {"a": {"a": 1}}, "b": [{"a": 1}, {"a": 1}], ":": ":"}',
    b"[0.1, -1.7976931348623157e308, 123456789012345678901234567890, true, false]",
]


@pytest.mark.parametrize("body", GOOD_JSON)
def test_it_reads_json_that_only_looks_bad(body: bytes) -> None:
    assert parse_json(body) == json.loads(body)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@given(JSON_VALUES, st.booleans())
@settings(max_examples=150, deadline=None)
def test_it_reads_what_the_standard_library_writes(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    if "\\u0000" not in text:
        assert parse_json(text.encode()) == value


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,\\u0dN1eE+-. x', max_size=40).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_no_bytes_get_past_it_unnamed(body: bytes) -> None:
    try:
        value = parse_json(body)
    except RequestInvalid:
        return
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def test_errors_name_place_value_and_rule() -> None:
    body = {
        "session_id": "s",
        "model_seq_id": -1,
        "base_model": "m",
        "lora_config": {"rank": 1.5, "train_mlp": 1},
    }
    with pytest.raises(RequestInvalid) as caught:
        validate(CreateModel, json.dumps(body).encode())
    error = caught.value
    assert error.place == "model_seq_id"
    assert error.message == (
        "must be greater than or equal to 0, got -1 (1 of 3 errors, then "
        "lora_config.rank: must be a valid integer, got 1.5; "
        "lora_config.train_mlp: must be a valid boolean, got 1)"
    )


def test_errors_show_twenty_and_the_total() -> None:
    body = {"session_id": "s", "user_metadata": {}, "tags": [1] * 50}
    with pytest.raises(RequestInvalid, match="1 of 50 errors") as caught:
        validate(CreateSession, json.dumps(body).encode())
    assert "tags[19]" in caught.value.message
    assert "tags[20]" not in caught.value.message


def test_errors_cut_and_escape_the_value() -> None:
    with pytest.raises(RequestInvalid) as caught:
        validate(RetrieveFuture, json.dumps({"request_id": "\u202eid\n" * 1000}).encode())
    shown = caught.value.message.split("got ")[1]
    assert len(shown) <= 80
    assert shown.startswith("'\\u202eid\\n")


def test_errors_do_not_show_secrets() -> None:
    body = {"path": "tinker://a/weights/b", "weights_access_token": "tml-secret" * 1000}
    with pytest.raises(RequestInvalid) as caught:
        validate(LoadWeights, json.dumps(body).encode())
    assert "tml-secret" not in str(caught.value)


@pytest.mark.parametrize("body", [b"[]", b"1", b'"x"', b"null"])
def test_a_request_must_be_an_object(body: bytes) -> None:
    with pytest.raises(RequestInvalid, match="must be a JSON object"):
        validate(RetrieveFuture, body)


def test_errors_are_all_told_to_the_client() -> None:
    assert all(issubclass(kind, MintError) for kind in (RequestInvalid, PayloadTooLarge, UnsupportedMedia))
