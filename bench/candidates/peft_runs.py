"""Runs that share one base model under plain transformers and PEFT. Axes: B rows, T positions, V vocabulary."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from bench.candidates.data import Part

PROJECTIONS: Final = [
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj", "lm_head"),
]


class PeftRuns:
    """An adapter and an AdamW for each run; the weights of adapters have the base model's dtype.

    PEFT's own default, adapters in float32 under a base in bfloat16, casts the input of each projection.
    """

    def __init__(self, model: Any, ranks: Sequence[int]) -> None:
        self._names = [f"run{i}" for i in range(len(ranks))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model: Any = get_peft_model(
                model, lora_config(ranks[0]), adapter_name=self._names[0], autocast_adapter_dtype=False
            )
            for name, rank in zip(self._names[1:], ranks[1:], strict=True):
                self.model.add_adapter(name, lora_config(rank), autocast_adapter_dtype=False)
        self.model.train()
        self._optimizers = [self._optimizer(name) for name in self._names]

    def step(self, parts_of_runs: Sequence[Sequence[Part]]) -> float:
        """Take one training step of each of the first runs, one after another; return the summed loss.

        The gradients of a run's parts add up.
        """
        losses = []
        for run, parts in enumerate(parts_of_runs):
            self.choose(run)
            losses += [self._add_gradient(part) for part in parts]
            self._optimizers[run].step()
            self._optimizers[run].zero_grad()
        return torch.stack(losses).sum().item()

    @torch.no_grad()
    def loss(self, parts: Sequence[Part]) -> float:
        """Return the first run's summed loss."""
        self.choose(0)
        return torch.stack([self._loss(part) for part in parts]).sum().item()

    def choose(self, run: int) -> None:
        """Make a run's adapter the active one."""
        if self.model.active_adapter != self._names[run]:
            self.model.set_adapter(self._names[run])

    @torch.no_grad()
    def generate(self, run: int, prompts: Sequence[list[int]], num_tokens: int) -> Tensor:
        """Return prompts with their greedy continuations, padded on the left, (B, T)."""
        self.choose(run)
        length = max(map(len, prompts))
        device = self.model.device
        tokens_BT = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
        mask_BT = torch.tensor(
            [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
        )
        generated: Tensor = self.model.generate(
            input_ids=tokens_BT,
            attention_mask=mask_BT,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return generated

    def _add_gradient(self, part: Part) -> Tensor:
        loss = self._loss(part)
        loss.backward()
        return loss.detach()

    def _loss(self, part: Part) -> Tensor:
        inputs = {"input_ids": part.tokens_BT, "attention_mask": part.mask_BT, "use_cache": False}
        if part.positions_BT is not None:
            inputs["position_ids"] = part.positions_BT
        # In float32, as transformers' own loss takes them.
        logits_BTV = self.model(**inputs).logits.float()
        return torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), part.targets_BT.flatten(), ignore_index=-100, reduction="sum"
        )

    def _optimizer(self, name: str) -> torch.optim.AdamW:
        own = [parameter for key, parameter in self.model.named_parameters() if f".{name}." in key]
        assert own, f"PEFT has no parameters for {name}"
        return torch.optim.AdamW(own, lr=1e-4, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)


def lora_config(rank: int, *, head: bool = True) -> LoraConfig:
    """Return LoRA on all eight kinds of projection, or on seven without the head."""
    targets = [name for name in PROJECTIONS if head or name != "lm_head"]
    return LoraConfig(r=rank, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
