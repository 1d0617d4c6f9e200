"""Check a recipe's settings against what is there: the base model, its limits, the user's datasets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from runs.exceptions import NotFound, RequestInvalid
from runs.models import DatasetVersion, TrainingRun, User
from runs.schemas.parsing import validate_object
from runs.schemas.problems import Problems, show
from runs.schemas.recipes import MIN_ROWS_TO_SPLIT, SftConfig
from runs.services import base_models, datasets

TRAINABLE: Final = (
    DatasetVersion.Kind.CHAT,
    DatasetVersion.Kind.COMPLETION,
    DatasetVersion.Kind.TEXT,
)

# What stands in for a setting that is wrong, so that the others can be checked all the same.
_STAND_INS: Final = {"base_model": "?", "dataset": "ds-000000000000"}


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Settings and what is wrong with them: (place, message) of each problem, in no case half of them.

    `config` and its `versions` (training, then validation) are there if nothing is wrong.
    """

    config: SftConfig | None
    versions: list[DatasetVersion]
    problems: tuple[tuple[str, str], ...]


def check(user: User, values: Mapping[str, Any]) -> Checked:
    """Check settings as they came, by the schema and against what is there, and tell all problems together."""
    problems: list[tuple[str, str]] = []
    try:
        config = parse_config(values)
    except RequestInvalid as error:
        problems += error.problems
    places = [place for place, _ in problems]
    versions: list[DatasetVersion] = []
    try:
        rest = _without(values, places) if places else config
        training, validation = check_config(user, rest)
        versions = [training, *validation]
    except RequestInvalid as error:
        # A stand-in is no setting of the person's, and what it was for has its problem already.
        problems += [(place, message) for place, message in error.problems if place not in places]
    if problems:
        return Checked(config=None, versions=[], problems=tuple(problems))
    return Checked(config=config, versions=versions, problems=())


def parse_config(values: Mapping[str, Any]) -> SftConfig:
    """Return checked settings.

    Raises:
        RequestInvalid: names each setting that is wrong.
    """
    return validate_object(SftConfig, dict(values))


def merged(held: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with some changed; of an object, like `samples`, what is left out stays, too."""
    both = dict(held)
    for name, value in given.items():
        old = held.get(name)
        both[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def check_config(user: User, config: SftConfig) -> tuple[DatasetVersion, list[DatasetVersion]]:
    """Check settings against the base model and the user's datasets; return training and validation data.

    Raises:
        RequestInvalid: names each setting that cannot be served.
    """
    problems = Problems()
    _check_sizes(config, problems)
    refs = {"dataset": config.dataset}
    refs |= {f"validation.datasets[{index}]": ref for index, ref in enumerate(config.validation.datasets)}
    versions: dict[str, DatasetVersion] = {}
    for place, ref in refs.items():
        try:
            versions[place] = _trainable(user, ref, place=place)
        except RequestInvalid as error:
            problems.add_error(error)
        except NotFound as error:
            problems.add(error.message, place=place)
    training = versions.pop("dataset", None)
    if config.early_stopping is not None and not has_validation(config, training):
        problems.add(
            f"{config.early_stopping} needs a validation loss; set validation.share above 0 or name "
            f"validation.datasets (datasets under {MIN_ROWS_TO_SPLIT} rows are not split)",
            place="early_stopping",
        )
    for place, version in versions.items():
        if training is not None and version.digest == training.digest:
            problems.add(_trained_on(refs[place], version, training), place=place)
    problems.raise_if_any()
    assert training is not None
    return training, list(versions.values())


def has_validation(config: SftConfig, training: DatasetVersion | None) -> bool:
    """Say whether a run has rows to measure a validation loss on, as far as its dataset is known."""
    is_split = training is None or training.num_rows >= MIN_ROWS_TO_SPLIT
    return bool(config.validation.datasets) or (config.validation.share > 0 and is_split)


def pinned(config: SftConfig, version: DatasetVersion, validation: list[DatasetVersion]) -> SftConfig:
    """Return the settings with the dataset versions that were found, so that a later version changes nothing."""
    data = config.validation.model_copy(update={"datasets": [ref_of(one) for one in validation]})
    return config.model_copy(update={"dataset": ref_of(version), "validation": data})


def ref_of(version: DatasetVersion) -> str:
    """Return the reference that names exactly this version."""
    return f"{version.dataset.public_id}@{version.number}"


def adapter_of(run: TrainingRun) -> dict[str, Any]:
    """Return the `lora` settings that describe a run's adapter."""
    return {
        "rank": run.lora_rank,
        "train_attn": run.train_attn,
        "train_mlp": run.train_mlp,
        "train_unembed": run.train_unembed,
    }


def refuse_other_adapter(config: SftConfig, run: TrainingRun) -> None:
    """Check that a fork has the base model and the adapter of the run that it starts from.

    Raises:
        RequestInvalid: names each setting that is another one.
    """
    problems = Problems()
    asked = {"base_model": config.base_model, **_placed(config.lora.model_dump())}
    for place, held in {"base_model": run.base_model, **_placed(adapter_of(run))}.items():
        if asked[place] != held:
            problems.add(
                f"{show(asked[place])} is not {show(held)}, which the checkpoint has and a fork keeps",
                place=place,
            )
    problems.raise_if_any()


def _placed(lora: Mapping[str, Any]) -> dict[str, Any]:
    return {f"lora.{name}": value for name, value in lora.items()}


def _without(values: Mapping[str, Any], places: list[str]) -> SftConfig:
    """Return the settings with their defaults, or stand-ins, at the places that are wrong.

    Raises:
        RequestInvalid: something else is wrong with them, which was told already.
    """
    kept = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for place in places:
        outer, _, inner = place.partition("[")[0].partition(".")
        group = kept.get(outer)
        if inner and isinstance(group, dict):
            group.pop(inner.partition(".")[0], None)
        else:
            kept.pop(outer or "num_steps", None)
        if outer == "validation":
            kept.pop("early_stopping", None)  # nobody knows what it would go by
    return parse_config({**_STAND_INS, **kept})


def _check_sizes(config: SftConfig, problems: Problems) -> None:
    try:
        info = base_models.get(config.base_model)
    except RequestInvalid as error:
        problems.add_error(error)
        return
    rank, length = config.lora.rank, config.max_length or 0
    if info.max_rank and rank > info.max_rank:
        problems.add(f"{rank} is above {info.max_rank}, the most {info.name} takes", place="lora.rank")
    if info.max_context and length > info.max_context:
        problems.add(
            f"{length} is above {info.max_context}, the context length of {info.name}", place="max_length"
        )


def _trained_on(ref: str, version: DatasetVersion, training: DatasetVersion) -> str:
    how = "is" if version == training else "has the same content as"
    return f"{ref} {how} {ref_of(training)}, which the run trains on; choose other rows"


def _trainable(user: User, ref: str, *, place: str) -> DatasetVersion:
    version = datasets.get_ready_version(user, ref, place=place)
    if version.kind not in TRAINABLE:
        raise RequestInvalid(
            f"{ref} holds {version.get_kind_display()}; supervised fine-tuning takes "
            "chat, prompt and completion, or raw text",
            place=place,
        )
    return version
