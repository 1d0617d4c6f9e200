"""What the way through SDK, web, database and worker costs: the same steps through all of it and in the engine alone.

On an instance of its own with shape S: a model that the worker computes with all cores, as the engine alone does.
"""

from __future__ import annotations

from contextlib import ExitStack
from statistics import median
from typing import Final

from bench.companion import Companion
from bench.instance import Instance
from bench.measurements import Lab
from bench.table import Row, ratio_row

_RANK: Final = 16
_AHEAD: Final = 4
_NUM_STEPS: Final = 4
_MAX_ROUNDS: Final = 3
_SHAPE: Final = "S"
_NAME: Final = "bench/S"


def full_stack(lab: Lab) -> list[Row]:
    """Put a pipelined SDK loop beside the engine alone and a padded PEFT loop, all on the same batches."""
    (lab.work_dir / "stack").mkdir()
    folder = lab.torch_side.ask("make_model", shape=_SHAPE, directory=str(lab.work_dir / "shapes"))
    with ExitStack() as stack:
        instance = stack.enter_context(
            Instance(lab.work_dir / "stack" / "data", MINTWEB_BASE_MODELS=f"{_NAME}={folder}")
        )
        client = stack.enter_context(
            Companion(lab.client_python, "bench.sdk_client", instance.sdk_env, log=lab.work_dir / "stack.log")
        )
        alone = stack.enter_context(lab.open_torch_side())
        vocab_size = alone.ask("use_model", directory=folder)["vocab_size"]
        return _rows(lab, client, alone, vocab_size)


def _rows(lab: Lab, client: Companion, alone: Companion, vocab_size: int) -> list[Row]:
    batches = [lab.batch(8, 32, 512, seed=seed, vocab_size=vocab_size) for seed in range(3)]
    client.ask("open_run", name="stack", base_model=_NAME, rank=_RANK, seed=1)

    def product(steps: int) -> float:
        return float(client.ask("loop", run="stack", batches=batches, steps=steps, ahead=_AHEAD))

    def engine(steps: int) -> float:
        return float(sum(alone.ask("engine_loop", batches=batches, steps=steps, rank=_RANK)))

    def peft(steps: int) -> float:
        return float(alone.ask("peft_loop", batches=batches, steps=steps, rank=_RANK))

    sides = {"product": product, "engine": engine, "peft": peft}
    for side in sides.values():
        side(2)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(min(lab.rounds, _MAX_ROUNDS)):
        for name, side in sides.items():
            taken[name].append(side(_NUM_STEPS))
    num_tokens = _NUM_STEPS * batches[0].num_tokens
    speeds = {name: f"{num_tokens / median(seconds):.0f} tokens/s" for name, seconds in taken.items()}
    note = f"8 sequences of 32 to 512 tokens a step, padding ratio {batches[0].padding_ratio:.2f}"
    return [
        ratio_row(
            "full stack, S fp32",
            f"SDK loop, {_AHEAD} steps ahead, against the engine alone",
            taken["engine"],
            taken["product"],
            at_least=0.95,
            note=f"{note}; {speeds['product']}, the engine {speeds['engine']}",
            seconds=taken,
        ),
        ratio_row(
            "full stack, S fp32",
            f"SDK loop, {_AHEAD} steps ahead, against transformers + PEFT, padded",
            taken["peft"],
            taken["product"],
            at_least=None,
            note=f"PEFT {speeds['peft']}",
            seconds=taken,
        ),
    ]
