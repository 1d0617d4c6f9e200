"""What `auto` makes of models on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from gpuworker.engine import precision
from gpuworker.engine.engine import Engine

needs_bfloat16 = pytest.mark.skipif(
    not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
    reason="the processor has no bfloat16 products",
)


def make_model(directory: Path, *, head_scale: float) -> Path:
    """Store a model wide enough to gain; the scale of its head is that of its log-probabilities' errors."""
    config = Qwen3Config(
        vocab_size=600,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(head_scale)
    model.save_pretrained(directory)
    return directory


def load(directory: Path, *, dtype: str = "auto") -> Engine:
    return Engine.load(directory, device="cpu", dtype=dtype)


@needs_bfloat16
def test_a_wide_model_takes_bfloat16_and_says_by_how_much_it_differs(tmp_path: Path) -> None:
    engine = load(make_model(tmp_path, head_scale=1.0))
    assert engine.fingerprint["dtype"] == "bfloat16"
    assert engine.precision.startswith("bfloat16: products are ")
    assert "log-probabilities change by 0.00" in engine.precision


@needs_bfloat16
def test_a_model_that_bfloat16_would_change_too_much_stays_in_float32(tmp_path: Path) -> None:
    engine = load(make_model(tmp_path, head_scale=200.0))
    assert engine.fingerprint["dtype"] == "float32"
    assert "above 0.05" in engine.precision


def test_a_narrow_model_stays_in_float32(model_directory: Callable[[str], Path]) -> None:
    engine = load(model_directory("qwen3"))
    assert engine.fingerprint["dtype"] == "float32"
    assert engine.precision.startswith("float32: the ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_named_dtype_is_not_questioned(dtype: str, model_directory: Callable[[str], Path]) -> None:
    engine = load(model_directory("qwen3"), dtype=dtype)
    assert engine.fingerprint["dtype"] == dtype
    assert engine.precision == f"{dtype}: as configured"


def test_the_trial_leaves_the_number_of_threads_alone(set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    assert precision.measure_speedup(torch.ones(64, 64)) > 0
    assert torch.get_num_threads() == 2
