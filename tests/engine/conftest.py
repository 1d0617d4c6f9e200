"""Tiny random base models, built once per test session, and helpers to make data for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from gpuworker.engine.engine import Engine

VOCAB_SIZE = 320

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**_SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "mistral": MistralConfig(**_SIZES, sliding_window=8),
    "gemma": GemmaConfig(**_SIZES),
    "gemma2": Gemma2Config(
        **_SIZES,
        sliding_window=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=6.0,
        query_pre_attn_scalar=16,
    ),
    "gemma3": Gemma3TextConfig(**_SIZES, sliding_window=8, query_pre_attn_scalar=16),
}


@pytest.fixture(scope="session", autouse=True)
def _threads() -> Iterator[None]:
    """One thread: on a busy machine the threads of such tiny products only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of a tiny model of the named architecture, with its tokenizer."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(CONFIGS[name])
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if parameter_name.endswith(("norm.weight", "bias")):
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(made[name])
            build_tokenizer().save(str(made[name] / "tokenizer.json"))
        return made[name]

    return make


@pytest.fixture(scope="session")
def load_engine(model_directory: Callable[[str], Path]) -> Callable[..., Engine]:
    """Return an engine on a tiny model; engines are shared, so tests use adapter ids of their own."""
    made: dict[tuple[str, str], Engine] = {}

    def load(name: str = "qwen3", *, dtype: str = "float32") -> Engine:
        if (name, dtype) not in made:
            made[name, dtype] = Engine.load(model_directory(name), device="cpu", dtype=dtype)
        return made[name, dtype]

    return load


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def engine(load_engine: Callable[..., Engine]) -> Engine:
    return load_engine()


def load_reference(directory: Path) -> PreTrainedModel:
    """Return the plain transformers model of a directory."""
    config = AutoConfig.from_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def build_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer with a few merges; ids 0 to 2 are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the hat that sat there"] * 4, trainer)
    return tokenizer


def random_tokens(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(3, VOCAB_SIZE, size=length, dtype=np.int64)
