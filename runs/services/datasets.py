"""Datasets: take a file in, have it checked, answer the person's choices, delete it."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from django.conf import settings
from django.db import transaction
from django.db.models import Max

from runs import events
from runs.datasets import formats
from runs.datasets.file_names import types_in
from runs.exceptions import NotFound, RequestInvalid
from runs.models import Dataset, DatasetVersion, User
from runs.services import access, blobs, dataset_uses, deletions
from runs.services.dataset_checks import ORIGINAL
from runs.services.dataset_rows import RowReader, drop_copies, open_rows

__all__ = ["RowReader", "open_rows"]

EXAMPLE_NAME: Final = "Pirate answers (example)"
REF_RULE: Final = "ds-<12 of 0-9 a-f>, or ds-<12 of 0-9 a-f>@<version>"
_EXAMPLE: Final = "examples/data/pirate_qa.jsonl"
_REF: Final = re.compile(r"(ds-[0-9a-f]{12})(?:@([1-9][0-9]{0,5}))?")
FOLDER: Final = "datasets"
_HASH_BYTES: Final = 1 << 20
_MAX_NAME: Final = 200
_MAX_DESCRIPTION: Final = 10_000
# Runs that a refusal to delete names.
_MAX_NAMED: Final = 5
State = DatasetVersion.State


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version for a file; `is_known` when the same content was there already."""

    version: DatasetVersion
    is_known: bool


# Take in -----------------------------------------------------------------------------------------------------


def create_version(
    user: User,
    *,
    path: Path,
    filename: str,
    dataset: Dataset | None = None,
    name: str = "",
    description: str = "",
) -> DatasetVersion:
    """Move a file into storage as a version of a dataset, new or given, and have it checked.

    The same content again is the version that is there already. In every case the file is gone afterwards.

    Raises:
        NotFound: the dataset was deleted meanwhile.
        RequestInvalid: the dataset holds this content under a name by which it is read as another type of file.
    """
    found = register(user, path=path, filename=filename, dataset=dataset, name=name, description=description)
    path.unlink()
    if reason := misread(found.version, filename):
        raise RequestInvalid(reason, place="filename")
    return found.version


def register(
    user: User,
    *,
    path: Path,
    filename: str,
    dataset: Dataset | None = None,
    name: str = "",
    description: str = "",
) -> Registered:
    """Do what `create_version` does, but leave the file where it is, and say whether the content is new.

    The file is in storage before the row that names it. A crash in between loses nothing and the call can
    be repeated; what it left in storage is swept later.

    Raises:
        NotFound: the dataset was deleted meanwhile.
    """
    digest = _digest(path)
    known = _known(user, dataset, digest, filename)
    if known is not None:
        return Registered(version=known, is_known=True)
    directory = f"{FOLDER}/{uuid.uuid4().hex}"
    blobs.link_in(path, f"{directory}/{ORIGINAL}")
    try:
        with transaction.atomic():
            _lock_datasets_of(user)
            version = _known(user, dataset, digest, filename)
            is_known = version is not None
            if version is None:
                owner = (
                    _still_there(dataset)
                    if dataset
                    else _new_dataset(user, printable(name) or Path(filename).stem, description)
                )
                version = _insert(owner, digest, directory, filename=filename, path=path)
                _have_checked(version)
    except BaseException:
        blobs.delete_folder(directory)
        raise
    if is_known:
        deletions.add(directory)
    return Registered(version=version, is_known=is_known)


def sample_dataset(user: User) -> DatasetVersion:
    """Return the user's copy of the example that comes with mintweb, made the first time."""
    example = settings.BASE_DIR / _EXAMPLE
    settings.TEMP_DIR.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.NamedTemporaryFile(dir=settings.TEMP_DIR, delete=False) as copy,
        example.open("rb") as source,
    ):
        shutil.copyfileobj(source, copy)
    description = "200 short questions, each answered as a pirate would: a first dataset to try."
    return create_version(
        user, path=Path(copy.name), filename=example.name, name=EXAMPLE_NAME, description=description
    )


def _insert(dataset: Dataset, digest: str, directory: str, *, filename: str, path: Path) -> DatasetVersion:
    newest = dataset.versions.aggregate(newest=Max("number"))["newest"] or 0
    return DatasetVersion.objects.create(
        dataset=dataset,
        number=newest + 1,
        digest=digest,
        filename=_stored(filename),
        size_bytes=path.stat().st_size,
        directory=directory,
    )


def _known(user: User, dataset: Dataset | None, digest: str, filename: str) -> DatasetVersion | None:
    """Return the version that an upload of this content is, if there is one.

    A dataset holds a content once. Without a dataset it is any of the user's versions that reads the file as its
    name says, and whose columns are as the doctor found them or can be chosen anew.
    """
    same = DatasetVersion.objects.filter(digest=digest, dataset__owner=user)
    versions = same.select_related("dataset").defer("report")
    if dataset is not None:
        return versions.filter(dataset=dataset).first()
    types = types_in(_stored(filename))
    of_type = (version for version in versions if types_in(version.filename) == types)
    return next((one for one in of_type if not (one.mapping and dataset_uses.is_used(one))), None)


def misread(version: DatasetVersion, filename: str) -> str:
    """Return why a version is not what an upload of its content under a name asks for, and the way out; else nothing."""
    if types_in(version.filename) == types_in(_stored(filename)):
        return ""
    ref = f"{version.dataset.public_id}@{version.number}"
    return (
        f"the same content is here as {ref}, read as the type of file that its name {version.filename[:80]!r} says; "
        f"to have it read as that of {filename[:80]!r}, upload it as a dataset of its own"
    )


def _lock_datasets_of(user: User) -> None:
    """Let nobody else add or delete datasets of this user until the transaction ends."""
    User.objects.select_for_update(no_key=True).get(pk=user.pk)


def _still_there(dataset: Dataset) -> Dataset:
    found = Dataset.objects.filter(pk=dataset.pk).first()
    if found is None:
        raise NotFound(f"dataset {dataset.public_id} was deleted", place="dataset")
    return found


def _new_dataset(user: User, name: str, description: str) -> Dataset:
    return Dataset.objects.create(
        public_id=f"ds-{uuid.uuid4().hex[:12]}",
        owner=user,
        name=printable(name)[:_MAX_NAME] or "dataset",
        description=_text(description),
    )


# Find --------------------------------------------------------------------------------------------------------


def parts_of(ref: str) -> tuple[str, int]:
    """Return the dataset and the version that a reference names: 0 for its newest, no dataset for no reference."""
    match = _REF.fullmatch(ref)
    return (match[1], int(match[2] or 0)) if match is not None else ("", 0)


def get_ready_version(user: User, ref: str, *, place: str = "dataset") -> DatasetVersion:
    """Return the version that `ds-...` (the newest ready one) or `ds-...@N` names.

    Raises:
        NotFound: there is no such dataset or version, or it is not the user's.
        RequestInvalid: it is no such reference, or cannot be trained on yet; the message says why.
    """
    public_id, number = parts_of(ref)
    if not public_id:
        raise RequestInvalid(f"{ref[:80]!r} names no dataset; use {REF_RULE}", place=place)
    if number:
        version = access.get_dataset_version(user, public_id, number)
        if version.state != State.READY:
            raise RequestInvalid(f"{ref} is not ready: it {_words(version)}", place=place)
        return version
    versions = access.get_dataset(user, public_id).versions.select_related("dataset")
    ready = versions.filter(state=State.READY).first()
    if ready is None:
        newest = versions.first()
        what = _words(newest) if newest is not None else "has no content"
        raise RequestInvalid(f"{public_id} is not ready: it {what}", place=place)
    return ready


def _words(version: DatasetVersion) -> str:
    if version.state == State.CHECKING:
        return "is being checked"
    if version.state == State.FAILED:
        return f"could not be read: {version.error}"
    return str(version.get_state_display())


# Choose ------------------------------------------------------------------------------------------------------


def choose_mapping(version: DatasetVersion, mapping: Mapping[str, str]) -> None:
    """Have a version checked again with columns as the person named them.

    Args:
        mapping: part to column, such as {"prompt": "Frage", "completion": "Antwort"}; an empty column
            leaves the part out.
    Raises:
        RequestInvalid: a part or column is unknown, the parts make no format, or runs use the version.
    """
    chosen = {part: column for part, column in mapping.items() if column}
    if not chosen:
        raise RequestInvalid("name at least one column", place="mapping")
    report = version.report
    formats.by_mapping(chosen, report.get("columns", []), report.get("sample", []))
    _check_again(version, mapping=chosen, skip_bad_rows=False)


def choose_encoding(version: DatasetVersion, encoding: str) -> None:
    """Have a version read in the encoding that the doctor has guessed.

    Raises:
        RequestInvalid: it is not that encoding, or runs use the version.
    """
    guess = version.report.get("encoding", "")
    if not guess or encoding != guess:
        raise RequestInvalid(f"must be {guess!r}, not {encoding[:40]!r}", place="encoding")
    _check_again(version, encoding=guess)


def skip_bad_rows(version: DatasetVersion) -> None:
    """Have a version made ready without the rows that are wrong.

    Raises:
        RequestInvalid: it does not wait for this choice.
    """
    _check_again(version, from_states=[State.NEEDS_CHOICE], skip_bad_rows=True)


def check_again(version: DatasetVersion) -> None:
    """Have a version that was refused checked once more, after what was in the way is gone.

    Raises:
        RequestInvalid: it was not refused.
    """
    _check_again(version, from_states=[State.FAILED])


def _check_again(
    version: DatasetVersion, *, from_states: list[State] | None = None, **changes: object
) -> None:
    states = from_states or [state for state in State if state != State.CHECKING]
    with transaction.atomic():
        # Locked against a run that is being started on it: its row refers to this one.
        rows = DatasetVersion.objects.select_for_update().filter(pk=version.pk, state__in=states)
        if not rows.exists():
            raise RequestInvalid("this version no longer waits for a choice", place="state")
        if dataset_uses.is_used(version):
            raise RequestInvalid("runs use this version, so its rows stay as they are", place="state")
        DatasetVersion.objects.filter(pk=version.pk).update(
            state=State.CHECKING, progress=0.0, error="", **changes
        )
        _have_checked(version)


def _have_checked(version: DatasetVersion) -> None:
    transaction.on_commit(lambda: events.ring_dataset_check(version.pk))


# Name and delete ---------------------------------------------------------------------------------------------


def rename(dataset: Dataset, name: str) -> None:
    """Give the dataset another name.

    Raises:
        RequestInvalid: nothing of the name can be seen.
    """
    name = printable(name)[:_MAX_NAME]
    if not name:
        raise RequestInvalid("must have at least one character", place="name")
    Dataset.objects.filter(pk=dataset.pk).update(name=name)


def describe(dataset: Dataset, description: str) -> None:
    """Say what the dataset is."""
    Dataset.objects.filter(pk=dataset.pk).update(description=_text(description))


def delete(dataset: Dataset) -> None:
    """Delete the dataset with all its versions and files.

    Raises:
        RequestInvalid: runs use it; names them.
    """
    with transaction.atomic():
        _lock_datasets_of(dataset.owner)
        versions = list(dataset.versions.select_for_update())
        num = dataset_uses.num_users([dataset.pk])[dataset.pk]
        if num:
            users = dataset_uses.users_of(dataset, limit=_MAX_NAMED)
            names = ", ".join(run.name or run.public_id for run in users)
            more = f" and {num - len(users)} more" if num > len(users) else ""
            raise RequestInvalid(f"used by {names}{more}; delete those runs first", place="dataset")
        Dataset.objects.filter(pk=dataset.pk).delete()
        deletions.add(*(version.directory for version in versions))
    for version in versions:
        drop_copies(version.directory)


# Texts -------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Return a name without control, bidirectional and zero-width characters, and without spaces around it."""
    return "".join(character for character in text if character.isprintable()).strip()


def _stored(filename: str) -> str:
    return printable(filename)[-255:] or "data"


def _text(text: str) -> str:
    return text.replace("\0", "").replace("\r\n", "\n").strip()[:_MAX_DESCRIPTION]


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            sha.update(block)
    return sha.hexdigest()
