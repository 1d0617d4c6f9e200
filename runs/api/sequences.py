"""Refused requests take up their seq_id: the client does not use the number again and goes on with the next."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from google.protobuf.message import DecodeError

from runs.api.decorators import ApiRequest
from runs.exceptions import MintError, NotFound, RequestInvalid
from runs.models import TrainingRun
from runs.schemas import tinker_pb2 as pb
from runs.schemas.data import WireModel
from runs.schemas.names import Id, SeqId
from runs.schemas.parsing import validate_object
from runs.services import access, operations


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
    if request.is_proto:
        message = pb.ForwardBackwardRequest.FromString(request.body)
        return {"model_id": message.model_id, "seq_id": message.seq_id}
    return json.loads(request.body)  # unlike the strict parser this one takes NaN
