"""The shipped base model, measured as its files stand in the tree; the bounds are those of its README."""

from __future__ import annotations

import json
import math
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

import gpuworker.tiny
from gpuworker.tiny.corpus import Split, arithmetic_turn, documents, fact_turn, render_chat
from gpuworker.tiny.evaluate import ask, held_out_loss, held_out_turns, share_right
from gpuworker.tiny.example_data import FILE_NAME, pirate_rows

MODEL = Path(gpuworker.tiny.__file__).parent / "model"
EXAMPLES = Path(gpuworker.tiny.__file__).parents[2] / "examples" / "data"
MAX_BYTES = 8_000_000
MAX_HELD_OUT_LOSS = 0.5


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def corpus_words() -> set[str]:
    texts = islice(documents(Split.TRAIN, seed=1), 5000)
    return {word for document in texts for word in re.findall(r"[A-Za-z]+", document.text)}


def test_it_is_a_qwen3_model_of_at_most_eight_megabytes(model: Qwen3ForCausalLM) -> None:
    assert isinstance(model, Qwen3ForCausalLM)
    assert (MODEL / "model.safetensors").stat().st_size <= MAX_BYTES


def test_held_out_loss_is_far_below_a_uniform_guess(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    loss = held_out_loss(model, tokenizer, num_rows=20, row_tokens=512)
    assert loss < MAX_HELD_OUT_LOSS < math.log(tokenizer.get_vocab_size()) / 5


def test_no_held_out_document_is_a_training_document() -> None:
    trained = {document.text for document in islice(documents(Split.TRAIN, seed=1), 20_000)}
    held_out = {document.text for document in islice(documents(Split.HELD_OUT, seed=1), 1000)}
    assert not trained & held_out


def test_the_corpus_repeats_with_its_seed() -> None:
    first, again, other = (list(islice(documents(Split.TRAIN, seed=seed), 20)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What does a cow say?", "A cow says moo."),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("What is 7 + 5?", "7 + 5 = 12."),
        ("Who are you?", "I am mintweb tiny, a very small language model."),
    ],
)
def test_it_answers_and_ends_its_turn(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, question: str, answer: str
) -> None:
    assert ask(model, tokenizer, question) == answer + "<|im_end|>"


def test_it_answers_held_out_questions(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    facts = list(islice(held_out_turns(fact_turn, seed=11), 40))
    sums = list(islice(held_out_turns(arithmetic_turn, seed=11), 40))
    assert share_right(model, tokenizer, facts) >= 0.8
    assert share_right(model, tokenizer, sums) >= 0.8


def test_a_greedy_story_is_readable(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, corpus_words: set[str]
) -> None:
    story = ask(model, tokenizer, "Tell me a story about a brave fox named Pip.")
    words = re.findall(r"[A-Za-z]+", story.removesuffix("<|im_end|>"))
    assert story.endswith(".<|im_end|>")
    assert len(words) > 40
    assert "Pip" in words
    assert "fox" in words
    assert set(words) <= corpus_words


def test_generation_stops_at_the_end_of_a_turn_or_text(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == ends
    prompt = "<|im_start|>user\nWhat does a dog say?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False)
    assert (
        tokenizer.decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=False)
        == "A dog says woof.<|im_end|>"
    )


def test_the_chat_template_renders_what_the_model_was_trained_on(
    chat_tokenizer: PreTrainedTokenizerBase,
) -> None:
    messages = [
        {"role": "system", "content": "Answer in one short sentence."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi!"},
    ]
    assert chat_tokenizer.apply_chat_template(messages, tokenize=False) == render_chat(messages)
    prompt = chat_tokenizer.apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"


def test_both_tokenizer_loaders_agree(chat_tokenizer: PreTrainedTokenizerBase, tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user\nWhat is 12 + 7?  \n\n\u65e5\u672c e\u0301 \U0001f600<|im_end|>\n"
    assert chat_tokenizer.encode(text) == tokenizer.encode(text).ids
    assert chat_tokenizer.eos_token == "<|im_end|>"
    assert chat_tokenizer.pad_token == "<|endoftext|>"


@given(text=st.text(max_size=200))
def test_any_text_survives_the_tokenizer(chat_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = chat_tokenizer.encode(text, add_special_tokens=False)
    assert chat_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_example_data_is_what_its_script_writes() -> None:
    lines = (EXAMPLES / FILE_NAME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == pirate_rows()
    questions = [row["messages"][0]["content"] for row in pirate_rows()]
    assert len(set(questions)) == len(questions) == 200
