"""What mintweb is compared with: plain transformers and PEFT, and the engine without anything around it.

`python -m bench.baselines`, driven by `bench.companion`; a process with torch on all cores.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench.batches import batch
from bench.candidates.data import engine_data, pad
from bench.candidates.engine_runs import EngineRuns
from bench.candidates.peft_runs import PeftRuns
from bench.companion import serve
from bench.shapes import RandomModel
from gpuworker.engine.engine import Engine

_held: dict[str, Any] = {}


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
        _held[key] = PeftRuns(_plain_model(), [rank])
    padded = [[pad(sequences)] for sequences in batches]
    begin = time.perf_counter()
    for one in padded:
        _held[key].step([one])
    return time.perf_counter() - begin


def engine_loop(batches: Sequence[dict[str, int]], steps: int, rank: int) -> list[float]:
    """Return the seconds of each step of a training loop in the engine, without anything around it."""
    key = f"engine-{rank}"
    if key not in _held:
        engine = Engine.load(Path(_held["directory"]), device="cpu", dtype="float32")
        _held[key] = EngineRuns(engine, [rank])
    data = [engine_data(batch(one).sequences()) for one in batches]
    taken = []
    for step in range(steps):
        begin = time.perf_counter()
        _held[key].step([data[step % len(data)]])
        taken.append(time.perf_counter() - begin)
    return taken


def make_model(shape: str, directory: str) -> str:
    """Save a model of random weights and return its folder."""
    return str(RandomModel(shape, Path(directory), device="cpu", dtype="float32").directory)


def _plain_model() -> Any:
    # PEFT changes the model it is given, so an adapter gets a fresh one each time.
    return _load(str(_held["directory"]))


def _load(directory: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


if __name__ == "__main__":
    serve(
        {
            one.__name__: one
            for one in (use_model, logprobs, peft_loop, peft_recorded, engine_loop, make_model)
        }
    )
