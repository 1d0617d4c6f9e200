"""What mintweb is compared with: plain transformers and PEFT, and the engine without anything around it.

`python -m bench.baselines`, driven by `bench.companion`; a process with torch on all cores.
Axes: B sequences, T positions of the padded rectangle.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.batches import Batch, batch
from bench.companion import serve
from gpuworker.engine.engine import Engine
from gpuworker.engine.types import AdamParams, Datum, ForwardBackward, LoraSpec, OptimStep

_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
_MICRO_TOKENS = 1024
_held: dict[str, Any] = {}
Padded: TypeAlias = tuple[Tensor, Tensor, Tensor]


def use_model(directory: str) -> dict[str, int]:
    """Choose the base model of everything that follows; return its sizes."""
    _held.clear()
    _held["directory"] = directory
    config = _plain_model().config
    return {"vocab_size": int(config.vocab_size), "num_parameters": int(_plain_model().num_parameters())}


def logprobs(batch_: dict[str, int], adapter: str = "") -> list[list[float]]:
    """Return the targets' log-probabilities by transformers, one sequence at a time, with a saved adapter if given."""
    model = PeftModel.from_pretrained(_plain_model(), adapter).eval() if adapter else _plain_model()
    answers = []
    with torch.no_grad():
        for sequence in batch(batch_).sequences():
            tokens = torch.tensor(sequence)
            scores = model(tokens[None, :-1]).logits[0].float().log_softmax(-1)
            answers.append(scores.gather(1, tokens[1:, None])[:, 0].tolist())
    return answers


def peft_loop(batches: Sequence[dict[str, int]], steps: int, rank: int) -> float:
    """Return the seconds of a plain PEFT training loop over padded batches."""
    sequences = [batch(one).sequences() for one in batches]
    return peft_recorded([sequences[step % len(sequences)] for step in range(steps)], rank)


def peft_recorded(batches: Sequence[Sequence[list[int]]], rank: int) -> float:
    """Return the seconds of a plain PEFT training loop, one step for each of these padded batches."""
    key = f"peft-{rank}"
    if key not in _held:
        _held[key] = PeftRuns(str(_held["directory"]), [rank])
    padded = [[pad(sequences)] for sequences in batches]
    begin = time.perf_counter()
    for one in padded:
        _held[key].step([one])
    return time.perf_counter() - begin


def engine_rounds(
    batches: Sequence[dict[str, int]], ranks: Sequence[int], rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of one training step of all runs, by PEFT and by the engine, alternating.

    PEFT takes run after run, switching adapters, either each batch as one padded rectangle or sorted by
    length into rectangles of a bounded size; the engine takes all runs packed. A run's step is forward,
    backward and optimizer.
    """
    peft = PeftRuns(str(_held["directory"]), ranks)
    engine = EngineRuns(str(_held["directory"]), ranks)
    whole = [[pad(batch(one).sequences())] for one in batches]
    sorted_ = [[pad(part) for part in micro_batches(batch(one).sequences())] for one in batches]
    data = [engine_data(batch(one)) for one in batches]
    candidates: dict[str, Callable[[], object]] = {
        "peft": lambda: peft.step(whole),
        "peft_sorted": lambda: peft.step(sorted_),
        "engine": lambda: engine.step(data),
    }
    for run in candidates.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            begin = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - begin)
    return taken


class PeftRuns:
    """Runs that share one base model under PEFT, an adapter and an optimizer each."""

    def __init__(self, directory: str, ranks: Sequence[int]) -> None:
        model = _load(directory)
        self._names = [f"run{i}" for i in range(len(ranks))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model: Any = get_peft_model(model, _lora(ranks[0]), adapter_name=self._names[0])
            for name, rank in zip(self._names[1:], ranks[1:], strict=True):
                self._model.add_adapter(name, _lora(rank))
        self._model.train()
        self._optimizers = [self._optimizer(name) for name in self._names]

    def step(self, parts_of_runs: Sequence[Sequence[Padded]]) -> None:
        """Take one training step of each run, one after another; the gradients of a run's parts add up."""
        for name, optimizer, parts in zip(self._names, self._optimizers, parts_of_runs, strict=True):
            if len(self._names) > 1:
                self._model.set_adapter(name)
            for part in parts:
                self._add_gradient(part)
            optimizer.step()
            optimizer.zero_grad()

    def _add_gradient(self, part: Padded) -> None:
        tokens_BT, targets_BT, mask_BT = part
        logits_BTV = self._model(input_ids=tokens_BT, attention_mask=mask_BT).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-100, reduction="sum"
        )
        loss.backward()

    def _optimizer(self, name: str) -> torch.optim.AdamW:
        own = [parameter for key, parameter in self._model.named_parameters() if f".{name}." in key]
        assert own, f"PEFT has no parameters for {name}"
        return torch.optim.AdamW(own, lr=1e-4, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)


class EngineRuns:
    """The same runs in mintweb's engine, in this process."""

    def __init__(self, directory: str, ranks: Sequence[int]) -> None:
        self._engine = Engine.load(Path(directory), device="cpu", dtype="float32")
        self._names = [f"run{i}" for i in range(len(ranks))]
        for name, rank in zip(self._names, ranks, strict=True):
            self._engine.create_adapter(name, LoraSpec(rank=rank, seed=1))

    def step(self, data: Sequence[tuple[Datum, ...]]) -> None:
        """Take one training step of all runs, packed."""
        jobs = [
            ForwardBackward(adapter_id=name, data=own, loss_fn="cross_entropy")
            for name, own in zip(self._names, data, strict=True)
        ]
        steps = [OptimStep(adapter_id=name, params=AdamParams(learning_rate=1e-4)) for name in self._names]
        for outcome in [*self._engine.forward_backward(jobs), *self._engine.optim_step(steps)]:
            if isinstance(outcome, Exception):
                raise outcome


def micro_batches(sequences: Sequence[list[int]]) -> list[list[list[int]]]:
    """Return the sequences sorted by length, in parts whose rectangles have a bounded number of tokens."""
    parts: list[list[list[int]]] = [[]]
    for sequence in sorted(sequences, key=len):
        if parts[-1] and (len(parts[-1]) + 1) * len(sequence) > _MICRO_TOKENS:
            parts.append([])
        parts[-1].append(sequence)
    return parts


def pad(sequences: Sequence[list[int]]) -> Padded:
    """Return tokens_BT, targets_BT (-100 where padded) and mask_BT."""
    length = max(map(len, sequences)) - 1
    tokens_BT = torch.zeros(len(sequences), length, dtype=torch.int64)
    targets_BT = torch.full_like(tokens_BT, -100)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence) - 1] = torch.tensor(sequence[:-1])
        targets_BT[row, : len(sequence) - 1] = torch.tensor(sequence[1:])
        mask_BT[row, : len(sequence) - 1] = 1
    return tokens_BT, targets_BT, mask_BT


def engine_data(of: Batch) -> tuple[Datum, ...]:
    """Return the batch as the engine takes it."""
    return tuple(
        Datum(
            tokens=np.array(sequence[:-1]),
            target_tokens=np.array(sequence[1:]),
            inputs={"weights": np.ones(len(sequence) - 1, dtype=np.float32)},
        )
        for sequence in of.sequences()
    )


def _plain_model() -> Any:
    # PEFT changes the model it is given, so an adapter gets a fresh one each time.
    return _load(str(_held["directory"]))


def _load(directory: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def _lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=32, target_modules=_PROJECTIONS, task_type="CAUSAL_LM")


if __name__ == "__main__":
    serve({one.__name__: one for one in (use_model, logprobs, peft_loop, peft_recorded, engine_rounds)})
