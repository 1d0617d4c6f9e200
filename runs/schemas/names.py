"""Names on the wire: ids, checkpoint names and `tinker://` paths, with the characters they may hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, StringConstraints

from runs.exceptions import RequestInvalid
from runs.schemas.problems import show

CheckpointKind = Literal["weights", "sampler_weights", "external_weights"]

MAX_INT64 = 2**63 - 1
MAX_ID_CHARS = 200
CHECKPOINT_NAME_RULE = "1 to 128 of A-Z a-z 0-9 . _ - and no dot at the start"
_CHECKPOINT_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
_PATH_RULE = "tinker://<training run id>/weights|sampler_weights|external_weights/<name>"


def _printable(text: str) -> str:
    # isprintable() also refuses NUL, line breaks, and the bidirectional and zero-width controls.
    if not text.isprintable():
        raise ValueError(f"must hold printable characters only, got {show(text)}")
    return text


def check_checkpoint_name(name: str) -> str:
    """Return the name. Raises ValueError (pydantic's own way) when it breaks the rule."""
    if not _CHECKPOINT_NAME.fullmatch(name):
        raise ValueError(f"a checkpoint name is {CHECKPOINT_NAME_RULE}, got {show(name)}")
    return name


@dataclass(frozen=True)
class TinkerPath:
    """A checkpoint's address; `str()` gives the wire form back."""

    training_run_id: str
    kind: CheckpointKind
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.training_run_id}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        """`weights/<name>`: what the endpoints call checkpoint_id."""
        return f"{self.kind}/{self.name}"


def parse_tinker_path(path: str, *, place: str = "path") -> TinkerPath:
    """Return the parts of a `tinker://` path.

    Raises:
        RequestInvalid: it has not exactly three parts, or one of them is not allowed.
    """
    try:
        return _split_path(path)
    except ValueError as error:
        raise RequestInvalid(str(error), place=place) from error


def _split_path(path: str) -> TinkerPath:
    scheme, separator, rest = path.partition("://")
    parts = rest.split("/")
    kinds: tuple[CheckpointKind, ...] = get_args(CheckpointKind)
    kind = next((kind for kind in kinds if parts[1:2] == [kind]), None)
    if scheme != "tinker" or not separator or len(parts) != 3 or not parts[0] or kind is None:
        raise ValueError(f"must be {_PATH_RULE}, got {show(path)}")
    if len(parts[0]) > MAX_ID_CHARS:
        raise ValueError(f"the training run id in it must have at most {MAX_ID_CHARS} characters")
    return TinkerPath(_printable(parts[0]), kind, check_checkpoint_name(parts[2]))


def _check_path(path: str) -> str:
    return str(_split_path(path))


Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS), AfterValidator(_printable)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=512), AfterValidator(_printable)]
DisplayName = Annotated[str, StringConstraints(max_length=200), AfterValidator(_printable)]
CheckpointName = Annotated[str, AfterValidator(check_checkpoint_name)]
PathText = Annotated[str, StringConstraints(max_length=512), AfterValidator(_check_path)]
SeqId = Annotated[int, Field(ge=0, le=MAX_INT64)]
Int64 = Annotated[int, Field(ge=-MAX_INT64 - 1, le=MAX_INT64)]
