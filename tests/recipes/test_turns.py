"""Which tokens of a conversation are trained on, by style of chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from runs.exceptions import RequestInvalid
from runs.recipes.rendering import Renderer
from tests.recipes import chat_models
from tests.recipes.chat_models import chat, renderer_in, save, trained

TWO = chat("One?", "First.", "Two?", "Second.")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {
        "byte_level": chat_models.byte_level(),
        "sentencepiece_like": chat_models.sentencepiece_like(),
    }


@pytest.fixture(params=["byte_level", "sentencepiece_like"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[request.param]


def renderer_with(tokenizer: Tokenizer, folder: Path, template: str) -> Renderer:
    return renderer_in(save(folder, tokenizer, template))


def stretches(renderer: Renderer, row: dict[str, Any], *, last: bool = False) -> list[str]:
    """Return the trained stretches; a sentencepiece decoder takes a stretch's first space."""
    return [one.lstrip(" ") for one in trained(renderer, row, "last" if last else "assistant")]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("CHATML", "<|im_end|>"),
        ("LLAMA3", "<|eot_id|>"),
        ("MISTRAL", "</s>"),
        ("GEMMA", "<end_of_turn>"),
        ("TOOLS", "<|im_end|>"),
        ("GENERATION", "<|im_end|>"),
    ],
)
def test_the_assistants_turns_are_trained_on_with_their_end(
    tokenizer: Tokenizer, tmp_path: Path, template: str, end: str
) -> None:
    renderer = renderer_with(tokenizer, tmp_path, getattr(chat_models, template))
    assert stretches(renderer, TWO) == [f"First.{end}", f"Second.{end}"]
    assert stretches(renderer, TWO, last=True) == [f"Second.{end}"]
    open_end = {"messages": [*TWO["messages"], {"role": "user", "content": "Three?"}]}
    assert stretches(renderer, open_end) == [f"First.{end}", f"Second.{end}"]
    assert stretches(renderer, open_end, last=True) == [f"Second.{end}"]


def test_a_system_message_that_moves_with_the_last_question_moves_no_mask(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    renderer = renderer_with(tokenizer, tmp_path, chat_models.MISTRAL)
    row = chat("One?", "First.", "Two?", "Second.", system="Be kind.")
    assert stretches(renderer, row) == ["First.</s>", "Second.</s>"]


@pytest.mark.parametrize("opening", ["", "<think>\\n"])
def test_thinking_that_is_dropped_from_earlier_turns_moves_no_mask(
    tokenizer: Tokenizer, tmp_path: Path, opening: str
) -> None:
    template = chat_models.THINKING.replace("opening | default('')", f"'{opening}'")
    renderer = renderer_with(tokenizer, tmp_path, template)
    row = chat(
        "One?",
        "<think>\nhm, <b>\n</think>\n\nFirst.",
        "Two?",
        "<im>",
        "Three?",
        "<think>\nso\n</think>\n\nThird.",
    )
    last = "so\n</think>\n\nThird.<|im_end|>" if opening else "<think>\nso\n</think>\n\nThird.<|im_end|>"
    assert stretches(renderer, row) == ["First.<|im_end|>", "<im><|im_end|>", last]
    assert stretches(renderer, row, last=True) == [last]


def test_thinking_that_the_prompt_skips_and_earlier_turns_leave_out_moves_no_mask(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    skipped = "<think>\\n\\n</think>\\n\\n"
    template = chat_models.THINKING.replace("opening | default('')", f"'{skipped}'")
    renderer = renderer_with(tokenizer, tmp_path, template)
    assert stretches(renderer, TWO) == ["First.<|im_end|>", "Second.<|im_end|>"]


def test_a_template_without_ends_gets_the_end_of_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{{ message.role + ':' + message.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    renderer = renderer_with(tokenizer, tmp_path, template)
    assert stretches(renderer, chat("One?", "First.")) == ["First.</s>"]
    assert stretches(renderer, {"messages": [*TWO["messages"][:2], {"role": "user", "content": "?"}]}) == [
        "First."
    ]


def test_the_next_header_ends_a_turn_if_the_model_stops_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + ':' + message.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    )
    folder = save(tmp_path, tokenizer, template)
    stops = [tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("</s>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    assert stretches(renderer_in(folder), TWO) == ["First.<|im_start|>", "Second.</s>"]


def test_a_template_that_takes_contents_in_parts_gets_parts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{{ message.role + ':' }}{% for part in message.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    renderer = renderer_with(tokenizer, tmp_path, template)
    assert stretches(renderer, TWO) == ["First.<|im_end|>", "Second.<|im_end|>"]


def test_an_answer_that_the_template_leaves_out_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = chat_models.CHATML.replace(
        "message.content", "(message.content if message.role == 'user' else 'x')"
    )
    renderer = renderer_with(tokenizer, tmp_path, template)
    with pytest.raises(RequestInvalid, match="message 2 cannot be told"):
        trained(renderer, TWO)


def test_an_answer_that_looks_like_the_opened_thinking_is_trained_on_from_its_start(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    template = chat_models.CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
    renderer = renderer_with(tokenizer, tmp_path, template)
    assert stretches(renderer, chat("One?", "<thin ice.", "Two?", "<b>")) == [
        "<thin ice.<|im_end|>",
        "<b><|im_end|>",
    ]


def test_an_end_that_only_the_last_turn_has_is_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{{ message.role + ':' + message.content }}"
        "{{ '</s>' if message.role == 'assistant' and not loop.last else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    renderer = renderer_with(tokenizer, tmp_path, template)
    assert stretches(renderer, TWO) == ["First.</s>", "Second.<|im_end|>"]


def test_a_generation_block_without_the_end_is_extended_to_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = chat_models.GENERATION.replace(
        "{{- message.content + '<|im_end|>' }}{%- endgeneration %}",
        "{{- message.content }}{%- endgeneration %}{{- '<|im_end|>' }}",
    )
    renderer = renderer_with(tokenizer, tmp_path, template)
    assert stretches(renderer, TWO) == ["First.<|im_end|>", "Second.<|im_end|>"]


def test_the_last_turn_of_a_template_with_several_blocks_a_turn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = chat_models.GENERATION.replace(
        "{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}",
        "{%- generation %}{{- message.content }}{%- endgeneration %}{{- '|' }}"
        "{%- generation %}{{- '<|im_end|>' }}{%- endgeneration %}",
    )
    renderer = renderer_with(tokenizer, tmp_path, template)
    assert stretches(renderer, TWO, last=True) == ["Second.", "<|im_end|>"]


def test_tool_calls_are_trained_on_and_results_are_not(tokenizer: Tokenizer, tmp_path: Path) -> None:
    renderer = renderer_with(tokenizer, tmp_path, chat_models.TOOLS)
    call = {"type": "function", "function": {"name": "sky", "arguments": {"at": "sea"}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Looking.", "tool_calls": [call]},
        {"role": "tool", "content": "fair"},
        {"role": "assistant", "content": "Fair."},
    ]
    assert stretches(renderer, {"messages": messages, "tools": [call]}) == [
        'Looking.\n<call>{"name": "sky", "arguments": {"at": "sea"}}</call><|im_end|>',
        "Fair.<|im_end|>",
    ]


def test_a_row_without_an_answer_trains_on_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    renderer = renderer_with(tokenizer, tmp_path, chat_models.CHATML)
    assert stretches(renderer, chat("One?")) == []
    assert stretches(renderer, chat("One?"), last=True) == []


def test_a_role_that_the_template_refuses_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    renderer = renderer_with(tokenizer, tmp_path, chat_models.GEMMA)
    with pytest.raises(
        RequestInvalid, match="of test/model refuses it: System role not supported; put the system"
    ):
        trained(renderer, chat("One?", "First.", system="Be kind."))


def test_a_conversation_that_the_assistant_begins_is_told_how_to_mend(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    renderer = renderer_with(tokenizer, tmp_path, chat_models.GEMMA)
    row = {"messages": [{"role": "assistant", "content": "Ahoy."}, {"role": "user", "content": "Hi"}]}
    with pytest.raises(RequestInvalid, match="begins with the assistant: put a user message before it"):
        trained(renderer, row)


@pytest.mark.parametrize(
    "template",
    [
        # Earlier answers are summed up.
        "{% for message in messages %}{{ message.role + ':' }}"
        "{{ message.content if loop.last else message.content | length }}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        # The newest message comes first.
        "{% for message in messages | reverse %}{{ message.role + ':' + message.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        # Answers are written twice.
        "{{ messages | length }}{% for message in messages %}"
        "{{ message.role + ':' + message.content + message.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
    ],
)
def test_turns_that_cannot_be_told_apart_are_an_error(
    tokenizer: Tokenizer, tmp_path: Path, template: str
) -> None:
    renderer = renderer_with(tokenizer, tmp_path, template)
    with pytest.raises(RequestInvalid, match=r"rewrites earlier turns, so that message \d cannot be told"):
        trained(renderer, TWO)


def test_a_template_that_counts_its_messages_moves_no_mask(tokenizer: Tokenizer, tmp_path: Path) -> None:
    renderer = renderer_with(tokenizer, tmp_path, "{{ messages | length }}" + chat_models.CHATML)
    assert stretches(renderer, TWO) == ["First.<|im_end|>", "Second.<|im_end|>"]
