from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    GraniteConfig,
    Phi3Config,
    Qwen3Config,
)

from gpuworker.engine import base_model
from gpuworker.engine.engine import Engine
from gpuworker.engine.exceptions import BaseModelError

from .conftest import CONFIGS, VOCAB_SIZE


def load(directory: Path, **changes: str) -> Engine:
    chosen = {"device": "cpu", "dtype": "float32"} | changes
    return Engine.load(directory, device=chosen["device"], dtype=chosen["dtype"])


def copy_of(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def change_config(directory: Path, **changes: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def processor_name() -> str:
    """Return what the system calls its processor."""
    told = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return told[0].split(": ", 1)[1] if told else platform.processor() or platform.machine()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_loads(architecture: str, load_engine: Callable[..., Engine]) -> None:
    engine = load_engine(architecture)
    assert engine.vocab_size == VOCAB_SIZE
    assert engine.max_context == 128
    assert engine.max_rank == 64
    assert engine.end_tokens == (1,)


def test_the_fingerprint_names_what_changes_bits(engine: Engine) -> None:
    assert dict(engine.fingerprint) == {
        "torch": torch.__version__,
        "device": "cpu",
        "device_name": processor_name(),
        "num_devices": "1",
        "dtype": "float32",
        "threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def test_auto_means_float32_on_a_cpu(model_directory: Callable[[str], Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("auto is CUDA here")
    assert load(model_directory("qwen3"), device="auto", dtype="auto").fingerprint["dtype"] == "float32"


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_rotary_frequencies_stay_float32_in_bfloat16(
    architecture: str, model_directory: Callable[[str], Path]
) -> None:
    base = base_model.load(model_directory(architecture), device="cpu", dtype="bfloat16")
    exact = base_model.load(model_directory(architecture), device="cpu", dtype="float32")
    expected = dict(exact.buffers())
    found = {name: buffer for name, buffer in base.buffers() if name.endswith("inv_freq")}
    assert found
    for name, buffer in found.items():
        assert torch.equal(buffer, expected[name]), name


def test_end_tokens_come_from_the_generation_config(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = copy_of(model_directory("qwen3"), tmp_path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert load(directory).end_tokens == (5, 7)


def test_it_refuses_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        load(tmp_path)


def test_it_refuses_models_that_are_more_than_text(tmp_path: Path) -> None:
    """Their settings lie one level down, under text_config."""
    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="not a plain language model"):
        load(tmp_path)


def test_it_refuses_torn_weights(model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy_of(model_directory("qwen3"), tmp_path)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load(directory)


def test_it_refuses_missing_weights_instead_of_inventing_them(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = copy_of(model_directory("qwen3"), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"layers\.1\.mlp\.up_proj"):
        load(directory)


def test_it_refuses_pickled_weights(model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy_of(model_directory("qwen3"), tmp_path)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load(directory)


def test_it_refuses_weights_that_are_not_finite(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = copy_of(model_directory("qwen3"), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="not finite"):
        load(directory)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_it_refuses_rope_that_looks_at_the_whole_batch(
    rope_type: str, model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    size = int(Qwen3Config(**_small()).head_dim) // 2
    rope = {
        "rope_type": rope_type,
        "rope_theta": 1e4,
        "factor": 2.0,
        "short_factor": [1.0] * size,
        "long_factor": [2.0] * size,
        "original_max_position_embeddings": 64,
    }
    if rope_type == "dynamic":
        rope = {key: rope[key] for key in ("rope_type", "rope_theta", "factor")}
    directory = change_config(copy_of(model_directory("qwen3"), tmp_path), rope_parameters=rope)
    with pytest.raises(BaseModelError, match=rope_type):
        load(directory)


def _small() -> dict[str, int]:
    return {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pad_token_id": 0,
    }


def test_it_refuses_fused_projections_by_name(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(Phi3Config(**_small())).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="0 linear layers named q_proj"):
        load(tmp_path)
    shutil.rmtree(tmp_path)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="q_proj"):
        load(tmp_path)


def test_it_refuses_a_model_whose_logits_it_does_not_reproduce(tmp_path: Path) -> None:
    """Granite divides its logits by a constant, which the head here does not know."""
    sizes = _small() | {"num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(
        GraniteConfig(**sizes, logits_scaling=4.0, initializer_range=0.3)
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="log-probabilities differ"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"), [({"device": "abacus"}, "abacus"), ({"dtype": "int8"}, "int8")]
)
def test_it_refuses_unknown_devices_and_dtypes(
    changes: dict[str, str], message: str, model_directory: Callable[[str], Path]
) -> None:
    with pytest.raises(BaseModelError, match=message):
        load(model_directory("qwen3"), **changes)
