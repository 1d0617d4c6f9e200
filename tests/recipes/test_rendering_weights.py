"""Answers of weight 0 are read by the model, and never trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from runs.exceptions import RequestInvalid
from runs.recipes.rendering import TrainOn
from tests.recipes import chat_models
from tests.recipes.chat_models import chat, renderer_in, save, trained

TURNS = ("Hi", "One.", "You?", "Two.", "Why?", "Three.")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_models.byte_level()


def weighted(*weights: int) -> dict[str, Any]:
    """Return three questions with answers of these weights."""
    row = chat(*TURNS)
    for answer, weight in zip(row["messages"][1::2], weights, strict=True):
        answer["weight"] = weight
    return row


@pytest.mark.parametrize("template", ["CHATML", "LLAMA3", "GENERATION", None])
@pytest.mark.parametrize(
    ("weights", "train_on", "learned"),
    [
        ((0, 1, 1), "assistant", ["Two.", "Three."]),
        ((1, 0, 1), "assistant", ["One.", "Three."]),
        ((1, 1, 0), "assistant", ["One.", "Two."]),
        ((1, 1, 1), "assistant", ["One.", "Two.", "Three."]),
        ((0, 1, 1), "last", ["Three."]),
        ((1, 1, 0), "last", []),
    ],
)
def test_an_answer_of_weight_zero_is_left_untrained(
    tokenizer: Tokenizer,
    tmp_path: Path,
    template: str | None,
    weights: tuple[int, ...],
    train_on: TrainOn,
    learned: list[str],
) -> None:
    source = getattr(chat_models, template) if template else None
    renderer = renderer_in(save(tmp_path, tokenizer, source))
    row = weighted(*weights)
    end = "<|eot_id|>" if template == "LLAMA3" else "<|im_end|>"
    assert trained(renderer, row, train_on) == [f"{answer}{end}" for answer in learned]
    # The text is that of the same conversation without weights.
    made, plain = (renderer.row(one, train_on=train_on, max_length=1000) for one in (row, chat(*TURNS)))
    assert made.tokens.tolist() == plain.tokens.tolist()


@pytest.mark.parametrize("template", ["CHATML", "GENERATION"])
def test_all_is_everything_but_the_answers_of_weight_zero(
    tokenizer: Tokenizer, tmp_path: Path, template: str
) -> None:
    renderer = renderer_in(save(tmp_path, tokenizer, getattr(chat_models, template)))
    before, after = trained(renderer, weighted(1, 0, 1), "all")
    start, gone, rest = renderer.decode(
        renderer.row(chat(*TURNS), train_on="all", max_length=1000).tokens.tolist()
    ).partition("Two.<|im_end|>")
    assert gone
    assert (before, after) == (start.removeprefix("<|im_start|>"), rest)  # nothing predicts the first token


def test_the_last_answer_is_found_where_a_template_rewrites_the_earlier_ones(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    renderer = renderer_in(save(tmp_path, tokenizer, chat_models.THINKING))
    row = weighted(0, 1, 1)
    assert trained(renderer, row, "last") == trained(renderer, chat(*TURNS), "last")


def test_a_template_of_several_blocks_an_answer_says_that_weights_cannot_be_followed(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    twice = chat_models.GENERATION.replace(
        "message.content + '<|im_end|>' }}{%- endgeneration %}",
        "message.content }}{%- endgeneration %}{%- generation %}{{- '<|im_end|>' }}{%- endgeneration %}",
    )
    renderer = renderer_in(save(tmp_path, tokenizer, twice))
    assert trained(renderer, chat(*TURNS)) == ["One.<|im_end|>", "Two.<|im_end|>", "Three.<|im_end|>"]
    with pytest.raises(RequestInvalid, match="does not mark each answer once"):
        trained(renderer, weighted(1, 0, 1))
