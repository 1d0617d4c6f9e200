"""The page that makes a run without code: its form, the live preview beside it, files of settings, and Try it.

A form is sent as any form is. Asked for JSON, the same addresses answer with data, or with every problem and
its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from django.contrib import messages
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.shortcuts import redirect, render
from django.template.loader import render_to_string
from django.urls import reverse
from django.views.decorators.http import require_http_methods, require_POST

from runs.exceptions import RequestInvalid
from runs.models import DatasetVersion, TrainingRun, User
from runs.pages import dataset_choices, run_form, run_origin, run_preview
from runs.pages.policies import signed_in
from runs.pages.run_form import Field, Values
from runs.pages.run_list import base_url
from runs.pages.run_origin import Origin
from runs.recipes import config_files, defaults, estimates, trial
from runs.recipes.estimates import Estimate
from runs.schemas.recipes import MAX_PROMPT_CHARS, MAX_PROMPTS, SftConfig
from runs.services import base_models, recipe_checks, recipes
from runs.services.data_starts import BEGINNING

_SHORT_RULES: Final = ("learning_rate", "max_length", "eval_every", "save_every", "samples.every")
Problem = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A field as the page shows it; `base` is what a reset leads back to, as JSON."""

    field: Field
    values: list[str]
    base: str
    error: str
    is_bound: bool

    @property
    def value(self) -> str:
        """Return the text of a field that has one."""
        return self.values[-1] if self.values else ""

    @property
    def default_label(self) -> str:
        """Return the default in the words of the page."""
        names = {"true": "yes", "false": "no", **dict(self.field.options)}
        return names.get(self.field.default, self.field.default)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A form that was sent, checked: `config` is there unless there are problems."""

    values: Values
    origin: Origin
    config: SftConfig | None
    versions: list[DatasetVersion]
    problems: Sequence[Problem]
    estimate: Estimate | None


@signed_in
@require_http_methods(["GET", "POST"])
def new_run(request: HttpRequest) -> HttpResponseBase:
    """Show the form, or start what it says."""
    user = _user(request)
    if request.method == "GET":
        origin = run_origin.origin_of(user, request.GET)
        return _page(request, origin, origin.values, origin.problems)
    sent = _sent(request)
    problems = sent.problems
    if sent.config is not None:
        try:
            run = _start(user, sent, sent.config)
        except RequestInvalid as error:
            problems = error.problems
        else:
            return _started(request, run)
    if _wants_json(request):
        return _problems(problems)
    return _page(request, sent.origin, sent.values, problems, status=422)


@signed_in
@require_POST
def preview(request: HttpRequest) -> HttpResponseBase:
    """Return what the form would come to: the card, every problem, and what rules decide for empty fields."""
    sent = _sent(request)
    lines = run_preview.lines_of(sent.estimate) if sent.estimate is not None else []
    steps, epochs = _lengths(sent.estimate)
    offer = dataset_choices.offer_to(_user(request))
    return JsonResponse(
        {
            "html": render_to_string("runs/new/_preview.html", {"lines": lines}),
            "summary": run_preview.summary_of(sent.estimate) if sent.estimate is not None else "",
            "problems": _as_json(sent.problems),
            "rules": _rules(sent),
            "num_steps": steps,
            "num_epochs": epochs,
            "offer": offer.word,
            "is_growing": offer.is_growing,
        }
    )


@signed_in
@require_POST
def read_file(request: HttpRequest) -> HttpResponseBase:
    """Fill the form from a YAML file; names the line of each problem."""
    user = _user(request)
    file = config_files.from_yaml(_text(request))
    checked = recipe_checks.check(user, file.values)
    if checked.problems:
        sentences = file.told(checked.problems)
        if _wants_json(request):
            return JsonResponse({"detail": "; ".join(sentences), "sentences": sentences}, status=422)
        raise RequestInvalid("; ".join(sentences), place="text")
    assert checked.config is not None
    pinned = recipe_checks.pinned(checked.config, checked.versions[0], checked.versions[1:])
    values = run_form.flat(pinned.model_dump(mode="json"), name=file.name)
    if _wants_json(request):
        return JsonResponse({"values": {**run_form.DEFAULTS, **values}})
    return _page(request, Origin(values=run_form.DEFAULTS), {**run_form.DEFAULTS, **values}, [])


@signed_in
@require_POST
def write_file(request: HttpRequest) -> HttpResponseBase:
    """Return the form as a YAML file to keep; asked for JSON, also as requests in Python and curl."""
    sent = _sent(request)
    if sent.config is None:
        if _wants_json(request):
            return _problems(sent.problems)
        return _page(request, sent.origin, sent.values, sent.problems, status=422)
    name = run_form.name_of(sent.values)
    text = config_files.to_yaml(sent.config, name=name)
    if not _wants_json(request):
        response = HttpResponse(text, content_type="application/yaml; charset=utf-8")
        response["Content-Disposition"] = 'attachment; filename="run.yaml"'
        return response
    address = base_url(request)
    return JsonResponse(
        {
            "yaml": text,
            "python": config_files.to_python(sent.config, name=name, base_url=address),
            "curl": config_files.to_curl(sent.config, name=name, base_url=address),
        }
    )


@signed_in
@require_POST
def try_it(request: HttpRequest) -> HttpResponseBase:
    """Start the run that shows what this is about."""
    return _started(request, trial.start(_user(request)))


# -- forms -----------------------------------------------------------------------------------------------


def _sent(request: HttpRequest) -> Sent:
    """Return the form that came with a request, checked with everything that can be wrong with it."""
    user = _user(request)
    values = {key: [str(text) for text in texts] for key, texts in request.POST.lists()}
    origin = run_origin.origin_of(user, request.GET, form=values)
    settings = run_form.nested(values)
    if origin.fork is not None:
        settings = origin.fork.bound(settings)
    checked = recipe_checks.check(user, settings)
    problems = [_worded(problem) for problem in checked.problems]
    problems += _prompt_problems(settings, checked.problems)
    estimate = None
    if checked.config is not None:
        first_step, data_start = 0, BEGINNING
        if origin.fork is not None:
            first_step = origin.fork.first_step
            data_start = origin.fork.data_start(checked.config, checked.versions[0])
        estimate = estimates.estimate(
            checked.config, checked.versions, first_step=first_step, data_start=data_start
        )
        if not estimate.amounts.num_steps:
            problems.append(_ends_too_soon(checked.config, first_step))
    is_good = not problems
    return Sent(
        values=values,
        origin=origin,
        config=checked.config if is_good else None,
        versions=checked.versions,
        problems=problems,
        estimate=estimate if is_good else None,
    )


def _worded(problem: Problem) -> Problem:
    """Return a problem as a person with lists to choose from would say it."""
    return (problem[0], "choose one") if problem[1] == "is missing" else problem


def _prompt_problems(settings: Mapping[str, Any], known: Sequence[Problem]) -> list[Problem]:
    """Return a problem for a prompt that comes twice: a film strip would show one row for both."""
    prompts = settings.get("samples", {}).get("prompts", [])
    if any(place.startswith("samples.prompts") for place, _ in known):
        return []
    return [
        (f"samples.prompts[{index}]", "is the same as another prompt")
        for index, prompt in enumerate(prompts)
        if prompt in prompts[:index]
    ]


def _ends_too_soon(config: SftConfig, first_step: int) -> Problem:
    place = "num_epochs" if config.num_steps is None else "num_steps"
    return place, f"the run would end before step {first_step}, where the fork goes on; train for longer"


def _start(user: User, sent: Sent, config: SftConfig) -> TrainingRun:
    name = run_form.name_of(sent.values)
    source = TrainingRun.Source.BROWSER
    fork = sent.origin.fork
    if fork is None:
        return recipes.start(user, config, name=name, source=source)
    return recipes.fork(
        user,
        fork.checkpoint,
        with_optimizer=fork.with_optimizer,
        changes=config.model_dump(mode="json"),
        name=name,
        source=source,
    )


def _rules(sent: Sent) -> dict[str, str]:
    """Return what an empty field comes to, as far as it is known."""
    if sent.estimate is not None:
        decided = run_form.flat(sent.estimate.config.model_dump(mode="json"))
        return {place: decided[place][0] for place in _SHORT_RULES if decided.get(place)}
    info = base_models.find((sent.values.get("base_model") or [""])[-1])
    if info is None:
        return {}
    return {
        "learning_rate": str(defaults.learning_rate(info, 1)),
        "max_length": str(defaults.max_length(info)),
    }


def _lengths(estimate: Estimate | None) -> tuple[str, str]:
    """Return steps and epochs as the form has them."""
    if estimate is None:
        return "", ""
    num_epochs = float(f"{estimate.amounts.num_epochs:.3g}")
    return str(estimate.config.num_steps), f"{num_epochs:g}"


# -- the page --------------------------------------------------------------------------------------------


def _page(
    request: HttpRequest, origin: Origin, values: Values, problems: Sequence[Problem], *, status: int = 200
) -> HttpResponse:
    user = _user(request)
    errors = {place.partition("[")[0]: message for place, message in reversed(problems)}
    fork = origin.fork
    base_model = base_models.find((values.get("base_model") or [""])[-1])
    chosen = [ref for place in ("dataset", "validation.datasets") for ref in values.get(place, ()) if ref]

    def shown(field: Field) -> Shown:
        return Shown(
            field=field,
            values=list(values.get(field.place, ())),
            base=json.dumps(origin.values.get(field.place, [])),
            error=errors.get(field.place, ""),
            is_bound=fork is not None and field.place.startswith("lora."),
        )

    return render(
        request,
        "runs/new/new_run.html",
        {
            "origin": origin,
            "fork": fork,
            "query": request.GET.urlencode(),
            # A draft goes on with a dataset that was uploaded for it; those of other origins are apart.
            "draft_query": request.GET.urlencode() if fork or origin.run else "",
            "base": {place: json.dumps(texts) for place, texts in origin.values.items()},
            "prompts_base": json.dumps(origin.values["samples.prompts"]),
            "prompts_error": errors.get("samples.prompts", ""),
            "validation_base": json.dumps(origin.values["validation.datasets"]),
            "validation_error": errors.get("validation.datasets", ""),
            "name": run_form.name_of(values),
            "base_model": base_model.name if base_model is not None else "",
            "base_model_error": base_model.error if base_model is not None else "",
            "base_models": base_models.available(),
            # Before the datasets: what becomes ready in between is looked for again.
            "offer": dataset_choices.offer_to(user).word,
            "datasets": dataset_choices.choices_of(user, chosen),
            "dataset": (values.get("dataset") or [""])[-1],
            "validation_datasets": [ref for ref in values.get("validation.datasets", ()) if ref],
            "prompts": [text for text in values.get("samples.prompts", ()) if text.strip()],
            "length": (values.get(run_form.LENGTH) or ["epochs"])[-1],
            "num_epochs": (values.get("num_epochs") or [""])[-1],
            "num_steps": (values.get("num_steps") or [""])[-1],
            "main_fields": [shown(field) for field in run_form.MAIN],
            "groups": [(group.title, [shown(field) for field in group.fields]) for group in run_form.MORE],
            "errors": errors,
            "problems": problems,
            "max_prompts": MAX_PROMPTS,
            "max_prompt_chars": MAX_PROMPT_CHARS,
            "max_validation_datasets": run_form.MAX_VALIDATION_DATASETS,
        },
        status=status,
    )


# -- answers ---------------------------------------------------------------------------------------------


def _started(request: HttpRequest, run: TrainingRun) -> HttpResponseBase:
    address = reverse("run-detail", args=[run.public_id])
    if _wants_json(request):
        return JsonResponse({"run_id": run.public_id, "url": address}, status=201)
    messages.success(request, "The run was started.")
    return redirect(address)


def _problems(problems: Sequence[Problem]) -> HttpResponseBase:
    detail = "; ".join(f"{place}: {message}" if place else message for place, message in problems)
    return JsonResponse({"detail": detail, "problems": _as_json(problems)}, status=422)


def _as_json(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [{"place": place, "message": message} for place, message in problems]


def _text(request: HttpRequest) -> str:
    """Return the text that was pasted, or that of the file that was sent."""
    file = request.FILES.get("file")
    if file is None:
        return request.POST.get("text", "")
    if (file.size or 0) > 4 * config_files.MAX_CHARS:
        raise RequestInvalid(f"the file has {file.size} bytes, which is too much for settings", place="file")
    try:
        text: str = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestInvalid("the file is not UTF-8 text", place="file") from error
    return text


def _wants_json(request: HttpRequest) -> bool:
    return request.headers.get("accept", "").startswith("application/json")


def _user(request: HttpRequest) -> User:
    user: User = request.user  # type: ignore[assignment]
    return user
