"""Folders like those of base models: a small tokenizer of a public kind and a chat template of a public style."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from runs.recipes import tokenizer_files
from runs.recipes.rendering import Renderer, TrainOn

ROOT: Final = Path(__file__).resolve().parent.parent.parent
SPECIALS: Final = (
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
)

CHATML: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# No generation prompt; the system message goes into the last user message.
MISTRAL: Final = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- for message in turns %}
{%- if message.role == 'user' %}
{%- set is_last = (turns[loop.index:] | selectattr('role', 'equalto', 'user') | list | length) == 0 %}
{{- '[INST] ' + ((system + '\\n\\n') if system is defined and is_last else '') + message.content + '[/INST]' }}
{%- else %}{{- ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA: Final = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
TOOLS: Final = """
{%- if tools %}
    {{- '<|im_start|>system\\nTools:' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<response>' + message.content + '</response><|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<call>{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}</call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Drops the thinking of answers before the last question, and gives the others an empty one.
THINKING: Final = """
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set thinking = '' %}
        {%- if '</think>' in content %}
            {%- set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {%- set content = '<think>\\n' + thinking + '\\n</think>\\n\\n' + content %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' + opening | default('') }}{%- endif %}
"""
GENERATION: Final = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}{{- message.content + '<|im_end|>' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def byte_level() -> Tokenizer:
    """Return a byte-level tokenizer whose offsets leave leading spaces out, with a BOS token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    _train(tokenizer, trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]),
        ]
    )
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Return a tokenizer that marks spaces, puts one before the text, and falls back to bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *pieces], show_progress=False)
    _train(tokenizer, trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, template: str | list[dict[str, str]] | None) -> Path:
    """Write a model's folder, as far as tokens go."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def renderer_in(folder: Path) -> Renderer:
    """Return the renderer of a folder."""
    return Renderer(tokenizer_files.read("test/model", folder))


def chat(*turns: str, system: str = "") -> dict[str, Any]:
    """Return a row of alternating user and assistant turns."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "assistant" if number % 2 else "user", "content": turn} for number, turn in enumerate(turns)
    ]
    return {"messages": messages}


def trained(renderer: Renderer, row: dict[str, Any], train_on: TrainOn = "assistant") -> list[str]:
    """Return each stretch of trained tokens as text."""
    made = renderer.row(row, train_on=train_on, max_length=100_000)
    stretches: list[list[int]] = []
    previous = False
    for token, is_trained in zip(made.tokens.tolist(), made.mask.tolist(), strict=True):
        if is_trained and not previous:
            stretches.append([])
        if is_trained:
            stretches[-1].append(token)
        previous = is_trained
    return [renderer.decode(stretch) for stretch in stretches]


def _train(tokenizer: Tokenizer, trainer: Any) -> None:
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_special_tokens(list(SPECIALS))


def _texts() -> Iterator[str]:
    for line in (ROOT / "examples" / "data" / "pirate_qa.jsonl").read_text().splitlines():
        yield from (message["content"] for message in json.loads(line)["messages"])
