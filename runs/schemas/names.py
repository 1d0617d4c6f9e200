"""Names on the wire: ids, checkpoint names and `tinker://` paths, with the characters they may hold."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

from runs.schemas.problems import show

_CHECKPOINT_KINDS = ("weights", "sampler_weights", "external_weights")

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


def _check_path(path: str) -> str:
    """Return a `tinker://` path whose form is right; `runs.ids` takes it apart."""
    scheme, separator, rest = path.partition("://")
    parts = rest.split("/")
    if (
        scheme != "tinker"
        or not separator
        or len(parts) != 3
        or not parts[0]
        or parts[1] not in _CHECKPOINT_KINDS
    ):
        raise ValueError(f"must be {_PATH_RULE}, got {show(path)}")
    if len(parts[0]) > MAX_ID_CHARS:
        raise ValueError(f"the training run id in it must have at most {MAX_ID_CHARS} characters")
    _printable(parts[0])
    check_checkpoint_name(parts[2])
    return path


Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS), AfterValidator(_printable)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=512), AfterValidator(_printable)]
DisplayName = Annotated[str, StringConstraints(max_length=200), AfterValidator(_printable)]
CheckpointName = Annotated[str, AfterValidator(check_checkpoint_name)]
PathText = Annotated[str, StringConstraints(max_length=512), AfterValidator(_check_path)]
SeqId = Annotated[int, Field(ge=0, le=MAX_INT64)]
Int64 = Annotated[int, Field(ge=-MAX_INT64 - 1, le=MAX_INT64)]
