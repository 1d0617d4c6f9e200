"""Model shapes with random weights: made on the device from a seed, or saved once as a folder like any other model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from gpuworker.engine.base_model import BaseModel
from gpuworker.engine.engine import Engine
from gpuworker.engine.residency import AdapterMemory

_SEED: Final = 0
_CONTEXT: Final = 8192


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Qwen3 with tied embeddings.

    `is_saved` says whether its weights go through a folder as a product's do; those of a large
    shape take longer to write and read than everything that is measured.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_saved: bool = True

    @property
    def config(self) -> Qwen3Config:
        """Return the transformers config; it has no end token, so that every sample has its full length."""
        return Qwen3Config(
            architectures=["Qwen3ForCausalLM"],
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_position_embeddings=_CONTEXT,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            pad_token_id=0,
        )


_SMALL: Final = Shape(
    hidden_size=512,
    intermediate_size=1536,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=8192,
)
SHAPES: Final[dict[str, Shape]] = {
    "tiny": Shape(
        hidden_size=64,
        intermediate_size=192,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=512,
    ),
    "S": _SMALL,
    "S-151k": replace(_SMALL, vocab_size=151_936),
    "M": Shape(
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=10,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=32768,
    ),
    "qwen3-0.6b": Shape(
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
    ),
    "qwen3-4b": Shape(
        hidden_size=2560,
        intermediate_size=9728,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        is_saved=False,
    ),
}


class RandomModel:
    """One set of random weights, handed out as a plain transformers model or inside an engine."""

    def __init__(self, name: str, work_dir: Path, *, device: str, dtype: str) -> None:
        self.shape = SHAPES[name]
        self.device, self.dtype = torch.device(device), dtype
        self.directory = work_dir / name
        self.directory.mkdir(parents=True, exist_ok=True)
        self._save_tokenizer()
        if self.shape.is_saved:
            self._make().save_pretrained(self.directory)

    def plain(self) -> Any:
        """Return a model of its own, on the device."""
        if not self.shape.is_saved:
            return self._make()
        loaded = AutoModelForCausalLM.from_pretrained(self.directory, dtype=self._torch_dtype)
        return loaded.to(self.device).eval()

    def engine(self) -> Engine:
        """Return an engine with a model of its own."""
        if not self.shape.is_saved:
            base = BaseModel(self._make().requires_grad_(False), self.directory, precision="")
            return Engine(base, adapter_memory=AdapterMemory())
        return Engine.load(self.directory, device=str(self.device), dtype=self.dtype)

    @property
    def _torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def _make(self) -> Any:
        torch.manual_seed(_SEED)
        with self.device:
            model = AutoModelForCausalLM.from_config(
                self.shape.config, dtype=self._torch_dtype, attn_implementation="sdpa"
            )
        return model.eval()

    def _save_tokenizer(self) -> None:
        words = {f"t{i}": i for i in range(self.shape.vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t1").save_pretrained(
            self.directory
        )
