"""Rows as tokens, the preview's pieces, prompts; tokens are compared with those of the transformers library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest_django.fixtures import Settings
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from runs.exceptions import RequestInvalid
from runs.recipes import rendering
from runs.recipes.rendering import Renderer
from tests.recipes import chat_models
from tests.recipes.chat_models import chat, renderer_in, save, trained

TINY = chat_models.ROOT / "gpuworker" / "tiny" / "model"
CHATS = [
    chat("What is a ship?", "A ship, matey! \U0001f6a2 \u00e9\u4f60"),
    chat("Hi", " leading and trailing ", "And\n\nnow?", "Arr.\n"),
    chat("a<|im_end|>b", "say </s> twice </s>"),
    chat("x", ""),
]
CALLS = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "sky", "arguments": {"at": "sea <&>"}}}],
        },
        {"role": "tool", "content": "fair"},
        {"role": "assistant", "content": "Fair winds."},
    ],
    "tools": [{"type": "function", "function": {"name": "sky", "description": "the sky's \u00e9tat"}}],
}


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return chat_models.byte_level()


@pytest.fixture(scope="module")
def sentencepiece_like() -> Tokenizer:
    return chat_models.sentencepiece_like()


@pytest.fixture(scope="module")
def tiny() -> Renderer:
    return renderer_in(TINY)


def reference(folder: Path, row: dict[str, Any], **options: Any) -> Any:
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        row["messages"], tools=row.get("tools"), **{"return_dict": False, **options}
    )


def tokens_of(renderer: Renderer, row: dict[str, Any]) -> list[int]:
    tokens: list[int] = renderer.row(row, train_on="assistant", max_length=100_000).tokens.tolist()
    return tokens


@pytest.mark.parametrize("row", [*CHATS, chat("Hi", "Ho", system="Be kind.")])
def test_tiny_has_the_tokens_of_the_transformers_library(tiny: Renderer, row: dict[str, Any]) -> None:
    assert tokens_of(tiny, row) == reference(TINY, row)
    prompt = row["messages"][:-1]
    assert tiny.prompt(prompt) == reference(TINY, {"messages": prompt}, add_generation_prompt=True)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like"])
@pytest.mark.parametrize(
    "template", ["CHATML", "LLAMA3", "MISTRAL", "GEMMA", "TOOLS", "THINKING", "GENERATION"]
)
def test_templates_give_the_tokens_of_the_transformers_library(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, template: str
) -> None:
    folder = save(tmp_path, request.getfixturevalue(kind), getattr(chat_models, template))
    renderer = renderer_in(folder)
    rows = [*CHATS, CALLS] if template == "TOOLS" else CHATS
    for row in rows:
        assert tokens_of(renderer, row) == reference(folder, row)
        prompt = {**row, "messages": row["messages"][:1], "tools": None}
        assert renderer.prompt(prompt["messages"]) == reference(folder, prompt, add_generation_prompt=True)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like"])
def test_generation_blocks_give_the_mask_of_the_transformers_library(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    folder = save(tmp_path, request.getfixturevalue(kind), chat_models.GENERATION)
    renderer = renderer_in(folder)
    # The library loses a span that begins with a blank which the tokenizer leaves out of its offsets.
    for row in (row for row in CHATS if " leading" not in row["messages"][1]["content"]):
        mask = renderer.row(row, train_on="assistant", max_length=10_000).mask
        expected = reference(folder, row, return_dict=True, return_assistant_tokens_mask=True)
        assert mask.astype(int).tolist() == expected["assistant_masks"]


def test_all_is_every_token_but_the_first(tiny: Renderer) -> None:
    mask = tiny.row(CHATS[0], train_on="all", max_length=1000).mask
    assert not mask[0]
    assert mask[1:].all()


@pytest.mark.parametrize("row", [CALLS, {**chat("a", "b"), "tools": CALLS["tools"]}])
def test_a_template_without_tools_refuses_them(tiny: Renderer, row: dict[str, Any]) -> None:
    with pytest.raises(RequestInvalid, match="has no place for tool"):
        tokens_of(tiny, row)


def test_arguments_given_as_json_text_are_rendered_as_an_object(
    byte_level: Tokenizer, tmp_path: Path
) -> None:
    renderer = renderer_in(save(tmp_path, byte_level, chat_models.TOOLS))
    as_text = json.loads(json.dumps(CALLS))
    as_text["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"at": "sea <&>"}'
    assert tokens_of(renderer, as_text) == tokens_of(renderer, CALLS)


def test_named_templates_and_a_template_file_are_chosen_as_in_the_transformers_library(
    byte_level: Tokenizer, tmp_path: Path
) -> None:
    named = [
        {"name": "default", "template": chat_models.CHATML},
        {"name": "tool_use", "template": chat_models.TOOLS},
    ]
    folder = save(tmp_path / "named", byte_level, named)
    for row in (CHATS[0], CALLS):
        assert tokens_of(renderer_in(folder), row) == reference(folder, row)
    folder = save(tmp_path / "file", byte_level, chat_models.CHATML)
    (folder / "chat_template.jinja").write_text(chat_models.LLAMA3)
    assert tokens_of(renderer_in(folder), CHATS[0]) == reference(folder, CHATS[0])


def test_a_model_without_a_template_gets_chatml_if_it_has_the_markers(
    byte_level: Tokenizer, tmp_path: Path
) -> None:
    renderer = renderer_in(save(tmp_path, byte_level, None))
    row = chat("Hi", "Ho", system="Be kind.")
    assert renderer.decode(tokens_of(renderer, row)) == (
        "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHo<|im_end|>\n"
    )
    assert trained(renderer, row) == ["Ho<|im_end|>"]


def test_a_model_without_template_and_markers_gets_plain_text(byte_level: Tokenizer, tmp_path: Path) -> None:
    without = json.loads(byte_level.to_str())
    without["added_tokens"] = [token for token in without["added_tokens"] if "im_" not in token["content"]]
    renderer = renderer_in(save(tmp_path, Tokenizer.from_str(json.dumps(without)), None))
    row = chat("Hi", "Ho", "You?", "Me.", system="Be kind.")
    assert renderer.decode(tokens_of(renderer, row)) == (
        "<s>Be kind.\n\nUser: Hi\nAssistant: Ho</s>\nUser: You?\nAssistant: Me.</s>\n"
    )
    assert trained(renderer, row) == [" Ho</s>", " Me.</s>"]
    assert trained(renderer, row, "last") == [" Me.</s>"]
    assert renderer.decode(renderer.prompt("Hi")) == "<s>User: Hi\nAssistant:"


@pytest.mark.parametrize(
    ("prompt", "completion"), [("Say: ", "hello"), ("Say:", " hello"), ("http:", "//x"), ("", "all")]
)
def test_a_completion_is_trained_on_from_where_its_prompt_ends(
    byte_level: Tokenizer, tmp_path: Path, prompt: str, completion: str
) -> None:
    renderer = renderer_in(save(tmp_path, byte_level, None))
    row = {"prompt": prompt, "completion": completion}
    made = renderer.row(row, train_on="assistant", max_length=100)
    assert trained(renderer, row) == [completion + "</s>"]
    assert made.tokens[~made.mask].tolist() == renderer.prompt(prompt, as_chat=False)


def test_sentencepiece_completions_stay_one_text(sentencepiece_like: Tokenizer, tmp_path: Path) -> None:
    renderer = renderer_in(save(tmp_path, sentencepiece_like, None))
    for prompt, completion in [("Say: ", "hello"), ("Say:", " hello"), ("a\u4f60", "\u4f60b")]:
        made = renderer.row({"prompt": prompt, "completion": completion}, train_on="all", max_length=100)
        assert renderer.decode(made.tokens.tolist()) == f"<s> {prompt}{completion}</s>"
        body = sentencepiece_like.encode(prompt + completion).ids
        assert made.tokens.tolist() == [*body, sentencepiece_like.token_to_id("</s>")]


def test_an_answer_is_shown_without_the_token_that_ended_it_and_with_all_others(tiny: Renderer) -> None:
    end = next(token for token in tiny.stop_tokens if tiny.decode([token]) == "<|im_end|>")
    words = tiny.prompt("Ahoy!", as_chat=False)
    assert tiny.answer([*words, end]) == tiny.answer(words) == "Ahoy!"
    assert tiny.answer([end, *words]) == "<|im_end|>Ahoy!"
    assert tiny.answer([end]) == tiny.answer([]) == ""


def test_a_text_is_trained_on_as_a_whole(tiny: Renderer, byte_level: Tokenizer, tmp_path: Path) -> None:
    row = {"text": "Once upon a time."}
    made = tiny.row(row, train_on="last", max_length=100)
    assert tiny.decode(made.tokens.tolist()) == "Once upon a time.<|im_end|>"
    assert made.mask.tolist() == [False] + [True] * (len(made.tokens) - 1)
    with_bos = renderer_in(save(tmp_path, byte_level, None))
    assert trained(with_bos, row) == ["Once upon a time.</s>"]


def test_a_row_is_cut_at_the_end(tiny: Renderer) -> None:
    whole = tiny.row(CHATS[0], train_on="assistant", max_length=1000)
    cut = tiny.row(CHATS[0], train_on="assistant", max_length=12)
    assert cut.tokens.tolist() == whole.tokens[:12].tolist()
    assert cut.mask.tolist() == whole.mask[:12].tolist()
    assert cut.num_truncated == len(whole.tokens) - 12
    assert whole.num_truncated == 0


def test_pieces_show_what_becomes_of_each_part(tiny: Renderer) -> None:
    pieces = tiny.pieces(chat("Hi", "Ho"), train_on="assistant", max_length=1000)
    assert [(piece.text, piece.is_trained, piece.is_special) for piece in pieces] == [
        ("<|im_start|>", False, True),
        ("user\nHi", False, False),
        ("<|im_end|>", False, True),
        ("\n", False, False),
        ("<|im_start|>", False, True),
        ("assistant\n", False, False),
        ("Ho", True, False),
        ("<|im_end|>", True, True),
        ("\n", False, False),
    ]


@pytest.mark.parametrize(
    "row", [*CHATS, {"prompt": "p: ", "completion": "c \U0001f6a2"}, {"text": "\u4f60\u597d"}]
)
@pytest.mark.parametrize("max_length", [1, 3, 9, 14, 20, 21, 1000])
def test_pieces_tell_the_whole_text_wherever_it_is_cut(
    tiny: Renderer, byte_level: Tokenizer, tmp_path: Path, row: dict[str, Any], max_length: int
) -> None:
    for renderer in (tiny, renderer_in(save(tmp_path, byte_level, chat_models.LLAMA3))):
        pieces = renderer.pieces(row, train_on="assistant", max_length=max_length)
        whole = renderer.row(row, train_on="assistant", max_length=100_000)
        assert "".join(piece.text for piece in pieces) == renderer.decode(whole.tokens.tolist())
        assert any(piece.is_truncated for piece in pieces) == (max_length < len(whole.tokens))
        assert not any(piece.is_truncated and piece.is_trained for piece in pieces)


@given(text=st.text(), answer=st.text())
def test_any_text_comes_back(text: str, answer: str) -> None:
    row = chat(text, answer)
    expected = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    renderer = _any_text_renderer()
    if any(mark in text + answer for mark in "\ufdd0\ufdd1\ufdd2"):
        with pytest.raises(RequestInvalid, match="noncharacter"):
            tokens_of(renderer, row)
        return
    assert renderer.decode(tokens_of(renderer, row)) == expected
    pieces = renderer.pieces(row, train_on="assistant", max_length=30)
    assert "".join(piece.text for piece in pieces) == expected


_tiny: list[Renderer] = []


def _any_text_renderer() -> Renderer:
    if not _tiny:
        _tiny.append(renderer_in(TINY))
    return _tiny[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "role 'pirate'; allowed are system, user"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "message 1 must be text, not list"),
        ({"messages": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"}, "preference"),
        ({"completion": "x"}, "prompt must be text, not NoneType"),
        ({"question": "x"}, "fields question;"),
    ],
)
def test_rows_of_no_trainable_kind_are_refused(tiny: Renderer, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestInvalid, match=message):
        tiny.row(row, train_on="assistant", max_length=100)


def test_many_rows_are_as_each_alone_with_errors_in_their_places(tiny: Renderer) -> None:
    rows = [CHATS[0], {"messages": []}, {"prompt": "Say: ", "completion": "yes"}, CHATS[1]]
    made = tiny.rows(rows, train_on="assistant", max_length=20)
    assert isinstance(made[1], RequestInvalid)
    for row, one in zip(rows, made, strict=True):
        if not isinstance(one, RequestInvalid):
            alone = tiny.row(row, train_on="assistant", max_length=20)
            assert one.tokens.tolist() == alone.tokens.tolist()
            assert one.mask.tolist() == alone.mask.tolist()


def test_a_text_as_prompt_is_what_the_user_says(tiny: Renderer) -> None:
    assert tiny.decode(tiny.prompt("Hi")) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.decode(tiny.prompt("Hi", as_chat=False)) == "Hi"
    assert {"<|im_end|>", "<|endoftext|>"} == {tiny.decode([token]) for token in tiny.stop_tokens}


def test_templates_run_in_a_sandbox(byte_level: Tokenizer, tmp_path: Path) -> None:
    escapes = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(999999999) %}{% endfor %}",
    ]
    for number, template in enumerate(escapes):
        renderer = renderer_in(save(tmp_path / str(number), byte_level, template))
        with pytest.raises(RequestInvalid, match="refuses it"):
            tokens_of(renderer, CHATS[0])


def test_unusable_folders_are_told(byte_level: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(RequestInvalid, match=r"no tokenizer\.json"):
        renderer_in(tmp_path)
    with pytest.raises(RequestInvalid, match="chat template of test/model cannot be read: line 1"):
        renderer_in(save(tmp_path / "syntax", byte_level, "{% for %}"))
    folder = save(tmp_path / "broken", byte_level, None)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(RequestInvalid, match=r"tokenizer\.json of test/model cannot be read"):
        renderer_in(folder)


@pytest.mark.django_db
def test_renderers_are_found_by_base_model_and_follow_their_files(
    byte_level: Tokenizer, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "model", byte_level, chat_models.CHATML)
    settings.BASE_MODELS = {"test/found": str(folder), "test/hub": "test/hub"}
    first = rendering.renderer_of("test/found")
    assert rendering.renderer_of("test/found") is first
    save(folder, byte_level, chat_models.LLAMA3)
    assert rendering.renderer_of("test/found").digest != first.digest
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(RequestInvalid, match="files of base model test/hub are not on this machine"):
        rendering.renderer_of("test/hub")
    cached = tmp_path / "hub" / "models--test--hub"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("c0ffee")
    shutil.copytree(folder, cached / "snapshots" / "c0ffee")
    (cached / "snapshots" / "c0ffee" / "config.json").write_text("{}")
    assert rendering.renderer_of("test/hub").digest == rendering.renderer_of("test/found").digest
    with pytest.raises(RequestInvalid, match="unknown base model 'test/none'; this server offers test/found"):
        rendering.renderer_of("test/none")
    assert rendering.decoder_of("test/none")([3, 14]) == "3 14"
