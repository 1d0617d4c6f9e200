"""Trains the base model that ships with the product, from nothing but the generated corpus.

    python -m gpuworker.tiny.train --out DIR

The defaults of `Settings` are those of the shipped files. Two idle CPU cores need about 14 minutes. One seed on
one kind of machine repeats; another CPU sums in another order and gets other bytes.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from gpuworker.tiny.corpus import (
    END_OF_TEXT,
    TURN_END,
    Split,
    arithmetic_turn,
    documents,
    fact_turn,
    reading_turn,
)
from gpuworker.tiny.evaluate import (
    ask,
    complete,
    held_out_loss,
    held_out_loss_by_kind,
    held_out_turns,
    next_token_loss,
    share_right,
    token_rows,
)
from gpuworker.tiny.tokenizer import VOCAB_SIZE, build_tokenizer, save_tokenizer

logger = logging.getLogger(__name__)

# Written as it stands, in the spelling that transformers 4 and 5 both read.
MODEL_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": VOCAB_SIZE - 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": 2048,
    "max_window_layers": 4,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": VOCAB_SIZE - 3,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB_SIZE,
}
GREEDY_QUESTIONS = (
    "Hello!", "Who are you?", "What does a cow say?", "What is the opposite of hot?", "What is 7 + 5?", "What is 12 minus 4?",
    "What is 3 * 4?", "Which is bigger, a mouse or a horse?", "What is a florbak?",
    "Mia went to the lake with a red kite. Tom went to the barn with a drum. Who had the drum?",
    "Tell me a story about a brave fox named Pip.",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The settings of one training run; the defaults made the shipped model."""

    seed: int = 1
    num_steps: int = 2100
    step_tokens: int = 4096
    row_tokens: int = 512
    # The last share of steps reads long rows, so that every position up to the model's limit has been trained.
    long_share: float = 1 / 15
    long_row_tokens: int = 2048
    learning_rate: float = 2e-3
    num_warmup_steps: int = 100
    # The cosine is longer than the run: the rate is still high when the cool-down takes it to zero.
    num_cosine_steps: int = 3000
    final_share: float = 0.02
    num_cooldown_steps: int = 440
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    num_tokenizer_documents: int = 30_000
    num_threads: int = 2


def learning_rate_at(step: int, settings: Settings) -> float:
    """Return the rate of one step: a linear warm-up, a cosine, and a linear cool-down over the last steps."""
    if step < settings.num_warmup_steps:
        return settings.learning_rate * (step + 1) / settings.num_warmup_steps
    progress = (step - settings.num_warmup_steps) / (settings.num_cosine_steps - settings.num_warmup_steps)
    cosine = settings.final_share + (1 - settings.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
    return (
        settings.learning_rate * cosine * min(1.0, (settings.num_steps - step) / settings.num_cooldown_steps)
    )


def batches(tokenizer: Tokenizer, settings: Settings) -> Iterator[Tensor]:
    """Yield one batch a step, tokens_BT of step_tokens ids: short rows, then long rows."""
    num_long_steps = round(settings.num_steps * settings.long_share)
    for row_tokens, num_steps in (
        (settings.row_tokens, settings.num_steps - num_long_steps),
        (settings.long_row_tokens, num_long_steps),
    ):
        # The row length joins the seed: the long rows hold documents of their own.
        rows = token_rows(
            tokenizer, Split.TRAIN, seed=settings.seed * 10_000 + row_tokens, row_tokens=row_tokens
        )
        for _ in range(num_steps):
            yield torch.tensor(list(islice(rows, settings.step_tokens // row_tokens)))


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Return AdamW that decays the matrices and leaves the norms alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))


def train(model: nn.Module, tokenizer: Tokenizer, settings: Settings) -> None:
    """Train model in place for num_steps."""
    optimizer = build_optimizer(model, settings)
    started = time.monotonic()
    for step, tokens_BT in enumerate(batches(tokenizer, settings)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        # The weights stay float32; bfloat16 products are about three times as fast on a CPU that has them.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next_token_loss(model, tokens_BT)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == settings.num_steps - 1:
            logger.info("step %d loss %.4f after %.0f s", step, loss.item(), time.monotonic() - started)


def save_model(model: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the weights in bfloat16, the configuration and the tokenizer; the tied head is not stored twice."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    generation = {
        "eos_token_id": [tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END_OF_TEXT)],
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
    }
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)


def report(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Log the held-out measures and the samples that the README shows."""
    loss = held_out_loss(model, tokenizer, num_rows=100, row_tokens=512)
    logger.info("held-out loss %.4f, uniform guess %.4f (nats per token)", loss, math.log(VOCAB_SIZE))
    for kind, kind_loss in held_out_loss_by_kind(model, tokenizer, num_documents=600).items():
        logger.info("held-out loss of %s: %.4f", kind, kind_loss)
    for write_turn in (fact_turn, arithmetic_turn, reading_turn):
        turns = list(islice(held_out_turns(write_turn, seed=7), 200))
        logger.info(
            "%s: %.1f%% of 200 held-out questions right",
            write_turn.__name__,
            100 * share_right(model, tokenizer, turns),
        )
    for question in GREEDY_QUESTIONS:
        logger.info("> %s\n%s", question, ask(model, tokenizer, question))
    for seed in range(3):
        start = "Once upon a time"
        drawn = complete(model, tokenizer, start, max_tokens=250, temperature=0.8, seed=seed)
        logger.info("drawn at temperature 0.8: %s%s", start, drawn)


def run(settings: Settings, folder: Path) -> None:
    """Train with settings, write the files into folder and report on the model as it was written."""
    torch.set_num_threads(settings.num_threads)
    torch.manual_seed(settings.seed)
    texts = (
        document.text for document in islice(documents(Split.TRAIN, seed=0), settings.num_tokenizer_documents)
    )
    tokenizer = build_tokenizer(texts)
    model = Qwen3ForCausalLM(Qwen3Config(**MODEL_CONFIG)).float()
    logger.info("%d parameters, settings %s", sum(p.numel() for p in model.parameters()), asdict(settings))
    train(model, tokenizer, settings)
    save_model(model, tokenizer, folder)
    report(Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the base model that ships with the product.")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the model's files")
    parser.add_argument("--steps", type=int, default=Settings.num_steps, help="training steps")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate, help="peak rate")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run(Settings(num_steps=arguments.steps, learning_rate=arguments.learning_rate), arguments.out)


if __name__ == "__main__":
    main()
