"""What a base model's folder says of its tokens: the tokenizer, chat templates, special tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from runs.exceptions import RequestInvalid
from runs.recipes import chat_templates
from runs.recipes.chat_templates import ChatTemplate

FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_DEFAULT, _TOOLS = "default", "tool_use"
_NAMES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Tokens that end a turn in public models, some of which name another one, or none, as their end of text.
_TURN_ENDS: Final = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<turn|>",
    "</s>",
)


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A base model's tokenizer and what goes with it.

    `prefix` is what the tokenizer itself puts before a text, mostly the beginning-of-text token; `ends` are
    the tokens that can end a turn; `specials` are all special tokens by id; `digest` changes with any of it.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    tool_template: ChatTemplate
    prefix: tuple[int, ...]
    eos: tuple[int, ...]
    ends: Mapping[int, str]
    specials: Mapping[int, str]
    adds_space: bool
    digest: str


def read(model: str, folder: Path) -> TokenizerFiles:
    """Read a base model's folder.

    Raises:
        RequestInvalid: the tokenizer or the chat template is missing or cannot be read.
    """
    tokenizer = _tokenizer(model, folder)
    config = _json(model, folder / "tokenizer_config.json")
    names = _special_names({**_json(model, folder / "special_tokens_map.json"), **config})
    specials = {
        token: added.content for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
    }
    eos = tokenizer.token_to_id(names.get("eos_token", ""))
    sample = tokenizer.encode("a")
    prefix = tuple(sample.ids[: sample.special_tokens_mask.index(0)])
    variables = {**names, "prefix": "".join(str(tokenizer.id_to_token(token)) for token in prefix)}
    sources = _templates(folder, config) or {_DEFAULT: _plain(tokenizer)}
    default = sources.get(_DEFAULT) or next(iter(sources.values()))
    return TokenizerFiles(
        tokenizer=tokenizer,
        template=ChatTemplate(default, variables, model=model),
        tool_template=ChatTemplate(sources.get(_TOOLS, default), variables, model=model),
        prefix=prefix,
        eos=() if eos is None else (eos,),
        ends=_ends(tokenizer, eos, _json(model, folder / "generation_config.json")),
        specials=specials,
        adds_space=_adds_space(tokenizer),
        digest=_digest(folder, sources, variables),
    )


def _tokenizer(model: str, folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise RequestInvalid(
            f"the base model {model} has no tokenizer.json in {folder.name}; save its fast tokenizer there",
            place="base_model",
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise RequestInvalid(
            f"the tokenizer.json of {model} cannot be read: {str(error)[:200]}", place="base_model"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json(model: str, file: Path) -> dict[str, Any]:
    """Return the object in a file, nothing if there is no file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestInvalid(
            f"the {file.name} of {model} cannot be read: {error}", place="base_model"
        ) from error
    return value if isinstance(value, dict) else {}


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens by name; they come as text or as an object with the text in it."""
    names = {}
    for name in _NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            names[name] = text
    return names


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name; a file of its own goes before the one in the configuration."""
    value = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(value, str):
        templates[_DEFAULT] = value
    elif isinstance(value, list):
        templates = {str(one["name"]): str(one["template"]) for one in value}
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    file = folder / "chat_template.jinja"
    if file.is_file():
        templates[_DEFAULT] = file.read_text(encoding="utf-8")
    return templates


def _plain(tokenizer: Tokenizer) -> str:
    """Return the template of a model that comes without one."""
    has_markers = all(tokenizer.token_to_id(token) is not None for token in ("<|im_start|>", "<|im_end|>"))
    return chat_templates.CHATML if has_markers else chat_templates.PLAIN


def _ends(tokenizer: Tokenizer, eos: int | None, generation: Mapping[str, Any]) -> dict[int, str]:
    given = generation.get("eos_token_id")
    tokens = {eos, *(given if isinstance(given, list) else [given])}
    tokens |= {tokenizer.token_to_id(name) for name in _TURN_ENDS}
    texts = {token: tokenizer.id_to_token(token) for token in tokens if token is not None}
    return {token: text for token, text in texts.items() if text}


def _adds_space(tokenizer: Tokenizer) -> bool:
    """Say whether a text's first word is encoded as if a space stood before it."""
    return any(
        tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith(mark) for mark in "\u2581\u0120"
    )


def _digest(folder: Path, sources: Mapping[str, str], variables: Mapping[str, str]) -> str:
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes())
    digest.update(json.dumps([sources, variables], sort_keys=True).encode())
    return digest.hexdigest()
