"""Chat templates: render messages as text the way the transformers library does, in a sandbox.

Knows neither tokens nor masks, save that it reports what `{% generation %}` blocks enclose. The plain
templates for models that come without one are here too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runs.exceptions import RequestInvalid

Message = Mapping[str, Any]
Span = tuple[int, int]

# Noncharacters of Unicode, which no proper text holds: around generation blocks, and in place of a turn's content.
_OPEN, _CLOSE, MARK = "\ufdd0", "\ufdd1", "\ufdd2"
_BRACKETS: Final = re.compile(f"([{_OPEN}{_CLOSE}])")
_GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a template may do wrong with a row: refuse it, or take a value for one of another type.
_TEMPLATE_ERRORS: Final = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)

_CALLS: Final = """
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + (call.function or call) | tojson + '\\n</tool_call>' }}
{%- endfor %}
"""
# For a model without a template whose vocabulary has the two ChatML markers.
CHATML: Final = (
    """
{{- prefix }}
{%- if tools %}{{- '<|im_start|>system\\nTools: ' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{{- message.content or '' }}"""
    + _CALLS
    + """{{- '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
)
# For one without them: "User: ...", "Assistant: ..." on lines of their own; a reply ends with the end-of-text token.
PLAIN: Final = (
    """
{{- prefix }}
{%- if tools %}{{- 'Tools: ' + tools | tojson + '\\n\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- 'Assistant:' }}
{%- generation %}
{{- ' ' + (message.content or '') }}"""
    + _CALLS
    + """{{- eos_token or '\\n' }}
{%- endgeneration %}
{{- '\\n' if eos_token else '' }}
{%- elif message.role == 'system' %}
{{- message.content + '\\n\\n' }}
{%- else %}
{{- message.role | capitalize + ': ' + message.content + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}
"""
)


class _Generation(jinja2.ext.Extension):
    """Put marks around what a `{% generation %}` block writes."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Callable[[], str]) -> str:
        return _OPEN + caller() + _CLOSE


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without the HTML escapes of jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - templates write the day as their reader sees it


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A compiled chat template of one base model.

    Args:
        variables: what the template sees beside the messages: the special tokens by name.
    Raises:
        RequestInvalid: the template is no valid jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str], *, model: str) -> None:
        self.model = model
        self.has_generation = _GENERATION.search(source) is not None
        self._source = source
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise RequestInvalid(
                f"the chat template of {model} cannot be read: line {error.lineno}: {error.message}",
                place="base_model",
            ) from error
        self._takes_parts = not self._writes("probe") and self._writes(_as_parts("probe"))

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        """Return the messages as text.

        Raises:
            RequestInvalid: the template refuses them.
        """
        text = self._render(messages, tools, add_generation_prompt=add_generation_prompt)
        return _BRACKETS.sub("", text) if self.has_generation else text

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> tuple[str, list[Span]]:
        """Return the text and the places in it that generation blocks enclose."""
        pieces: list[str] = []
        spans: list[Span] = []
        start = length = 0
        for piece in _BRACKETS.split(self._render(messages, tools)):
            if piece == _OPEN:
                start = length
            elif piece == _CLOSE:
                spans.append((start, length))
            else:
                pieces.append(piece)
                length += len(piece)
        return "".join(pieces), spans

    def check(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        """Refuse messages that the template would drop a part of, or that look like our marks.

        Raises:
            RequestInvalid: says what to change.
        """
        called = [message for message in messages if message.get("tool_calls")]
        if called and "tool_calls" not in self._source:
            raise RequestInvalid(
                f"the chat template of {self.model} has no place for tool calls; "
                "remove them or choose a model trained to call tools"
            )
        if tools and "tools" not in self._source:
            raise RequestInvalid(
                f"the chat template of {self.model} has no place for tools; "
                "remove them or choose a model trained to call tools"
            )
        texts = [str(message.get("content", "")) for message in messages]
        texts += [_tojson(message["tool_calls"]) for message in called]
        if any(mark in text for text in texts for mark in (_OPEN, _CLOSE, MARK)):
            raise RequestInvalid(
                "the text has a noncharacter (U+FDD0 to U+FDD2), which no text may hold; remove it"
            )

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        if self._takes_parts:
            messages = [{**message, "content": _as_parts(message["content"])} for message in messages]
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except _TEMPLATE_ERRORS as error:
            reason = (str(error).strip() or type(error).__name__)[:300]
            if "system" in reason.lower() and any(message["role"] == "system" for message in messages):
                reason += "; put the system message into the first user message"
            raise RequestInvalid(f"the chat template of {self.model} refuses it: {reason}") from error

    def _writes(self, content: object) -> bool:
        """Say whether the template writes a user message's content given in this form."""
        try:
            text = self._template.render(
                messages=[{"role": "user", "content": content}], tools=None, documents=None, **self._variables
            )
        except _TEMPLATE_ERRORS:
            return False
        return "probe" in text


def _as_parts(text: str) -> list[dict[str, str]]:
    """Return a content in the form that templates of models with vision take; some pass over plain text."""
    return [{"type": "text", "text": text}]
