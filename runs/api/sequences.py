"""Refused requests take up their seq_id: the client does not use the number again and goes on with the next."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Final

from google.protobuf.message import DecodeError

from runs.api.decorators import ApiRequest
from runs.exceptions import MintError, NotFound, RequestInvalid
from runs.models import TrainingRun
from runs.schemas import tinker_pb2 as pb
from runs.schemas.data import WireModel
from runs.schemas.names import Id, SeqId
from runs.schemas.parsing import validate_object
from runs.services import access, operations

_FIRST_FIELDS: Final = re.compile(rb"\x0a([\x01-\x7f])(.{0,127})", re.DOTALL)
_SECOND_FIELD: Final = re.compile(rb"\x10[\x80-\xff]{0,9}[\x00-\x7f]")
_IN_JSON: Final = {
    "model_id": re.compile(rb'"model_id"\s*:\s*("[^"\\]{1,200}")'),
    "seq_id": re.compile(rb'"seq_id"\s*:\s*([0-9]{1,19})\s*[,}]'),
}


class _Named(WireModel):
    model_id: Id
    seq_id: SeqId


@contextlib.contextmanager
def consuming_seq(request: ApiRequest, kind: str) -> Iterator[None]:
    """Enter the request as failed when it is refused inside for what it says."""
    try:
        yield
    except MintError as error:
        named = _named_operation(request) if error.category == "user" else None
        if named is not None:
            run, seq = named
            operations.reject(run, seq=seq, kind=kind, error=error)
        raise


def _named_operation(request: ApiRequest) -> tuple[TrainingRun, int] | None:
    """Return the run and seq_id that the body names, however wrong the rest of it is."""
    try:
        named = validate_object(_Named, _ids(request))
        return access.get_run(request.user, named.model_id), named.seq_id
    except (RequestInvalid, NotFound, DecodeError, ValueError, RecursionError):
        return None


def _ids(request: ApiRequest) -> object:
    received = request.received
    if received.refusal is not None:
        return (
            _ids_in_front(received.head) if request.is_proto else _ids_at_ends(received.head, received.tail)
        )
    if request.is_proto:
        message = pb.ForwardBackwardRequest.FromString(received.content)
        return {"model_id": message.model_id, "seq_id": message.seq_id}
    return json.loads(received.content)  # unlike the strict parser this one takes NaN


def _ids_in_front(head: bytes) -> object:
    """Return the ids of a message that is cut off: they are its first two fields, and clients write in this order."""
    found = _FIRST_FIELDS.match(head)
    if found is None or len(found[2]) < (length := found[1][0]):
        return None
    seq_id = _SECOND_FIELD.match(head, found.start(2) + length)
    if seq_id is None:
        return None
    message = pb.ForwardBackwardRequest.FromString(head[: seq_id.end()])
    return {"model_id": message.model_id, "seq_id": message.seq_id}


def _ids_at_ends(head: bytes, tail: bytes) -> object:
    """Return the ids of a JSON object of which the middle is unknown; what the ends do not tell once is left out."""
    told: dict[str, object] = {}
    for name, pattern in _IN_JSON.items():
        found = {match[1] for end in (head, tail) for match in pattern.finditer(end)}
        if len(found) == 1:
            told[name] = json.loads(found.pop())
    return told
