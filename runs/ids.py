"""Public ids and tinker:// paths: make them and take them apart. Knows no rows.

A session is a uuid; a run is `{session}:train:{n}`; a sampling session `{session}:sample:{n}`
(the client builds some of these itself, so the form is fixed); a checkpoint is
`tinker://{run}/{weights|sampler_weights}/{name}`; an operation is `op-{number}`.
"""

from __future__ import annotations

import re
import uuid
from typing import NamedTuple

from runs.exceptions import NotFound, RequestInvalid

_OPERATION = re.compile(r"op-([1-9][0-9]{0,17})\Z")
_CHECKPOINT_KINDS = ("weights", "sampler_weights")


class CheckpointPath(NamedTuple):
    """A tinker:// path taken apart."""

    run_id: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        """The part that is unique within a run."""
        return f"{self.kind}/{self.name}"


def new_session_id() -> str:
    """Return a fresh session id."""
    return str(uuid.uuid4())


def run_id(session_id: str, model_seq_id: int) -> str:
    """Return the public id of a session's n-th run; 0.38 derives the same string itself."""
    return f"{session_id}:train:{model_seq_id}"


def sampling_session_id(session_id: str, seq_id: int) -> str:
    """Return the public id of a session's n-th sampling session."""
    return f"{session_id}:sample:{seq_id}"


def parse_request_id(request_id: str) -> int:
    """Return the operation's number.

    Raises:
        NotFound: it is no id of ours; answered as if the operation did not exist.
    """
    match = _OPERATION.match(request_id)
    if match is None:
        raise NotFound
    return int(match[1])


def parse_path(path: str, *, place: str = "path") -> CheckpointPath:
    """Take a tinker:// path apart.

    Raises:
        RequestInvalid: it is not of the form tinker://RUN/KIND/NAME, or holds NUL, which no row's text can.
    """
    scheme, _, rest = path.partition("://")
    parts = rest.split("/")
    is_whole = scheme == "tinker" and len(parts) == 3 and all(parts) and "\0" not in path
    if not is_whole or parts[1] not in _CHECKPOINT_KINDS:
        raise RequestInvalid(
            f"{path[:80]!r} is no checkpoint path; one looks like tinker://<run>/weights/<name> "
            "or tinker://<run>/sampler_weights/<name>",
            place=place,
        )
    return CheckpointPath(*parts)


def parse_checkpoint_id(run: str, kind: str, name: str) -> CheckpointPath:
    """Build a path from the parts of a URL.

    Raises:
        NotFound: the kind is none of ours.
    """
    if kind not in _CHECKPOINT_KINDS:
        raise NotFound
    return CheckpointPath(run, kind, name)
