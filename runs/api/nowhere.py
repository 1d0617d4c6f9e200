"""Addresses that are none. An operation that a client sends to one takes up its seq_id like any that is refused."""

from __future__ import annotations

from typing import Final

from runs.api.decorators import ApiRequest, Reply
from runs.api.sequences import consuming_seq
from runs.exceptions import NotFound
from runs.models import Operation

_EXTERNAL: Final = "save_weights_external"
_INSTEAD: Final = (
    f"{_EXTERNAL} is not served here; use save_state and download the checkpoint from "
    "GET /rest/v1/runs/RUN/checkpoints/weights/NAME/download"
)
# Of mint's own calls: their seq_id, if any, is the caller's choice and not from the client's counter.
_UNCOUNTED: Final = "mint/"


def no_endpoint(request: ApiRequest) -> Reply:
    """Refuse a request to an address that is none."""
    address = request.path_args["address"]
    is_external = address == _EXTERNAL
    error = NotFound(_INSTEAD if is_external else "there is no such endpoint")
    if request.method != "POST" or address.startswith(_UNCOUNTED):
        raise error
    with consuming_seq(request, Operation.Kind.SAVE_WEIGHTS if is_external else Operation.Kind.SKIPPED):
        raise error
