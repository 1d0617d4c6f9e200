"""Training steps: one run beside every arrangement of its sequences, and several runs beside PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Final

from bench.candidates.data import Part, engine_data, micro_batches, pack, pad
from bench.candidates.trl_run import TrlRun, TrlSetting, is_installed
from bench.loaded import RANKS, Bench
from bench.table import Row
from bench.timing import Taken, describe
from gpuworker.engine.types import Datum

_SPREADS: Final = {60: (8, 22), 230: (32, 83), 1000: (128, 372)}
_MICRO_TOKENS: Final = {"cpu": 1024, "cuda": 4096}
_LOSS_APART: Final = {"float32": 1e-5, "bfloat16": 2e-3}
_PADDED, _SORTED, _TRL = 2.4, 1.5, 2.0
_TARGETS: Final = {
    ("S fp32", 60): 2.6,
    ("S fp32", 230): 1.4,
    ("S bf16", 60): 2.6,
    ("S bf16", 230): 1.4,
    ("M bf16", 60): 1.5,
}
"""For eight runs, by model and tokens a run."""


def one_run(bench: Bench) -> list[Row]:
    """Put one run on sequences of mixed lengths beside every arrangement of them under transformers."""
    mixed = bench.mixed_lengths()
    sequences, device = mixed.sequences(), bench.device
    micro = _MICRO_TOKENS[device.type]
    data = [engine_data(sequences)]
    arrangements = {
        "padded": [pad(sequences, device)],
        "sorted": [pad(part, device) for part in micro_batches(sequences, micro)],
        "packed": [pack(sequences, device)],
    }
    candidates: dict[str, Callable[[], float]] = {
        name: lambda parts=parts: bench.peft.step([parts])  # type: ignore[misc]
        for name, parts in arrangements.items()
    }
    candidates["engine"] = lambda: bench.engine.step(data)
    agreement = _agreement(bench, arrangements, data)
    trainers = _trainers(bench, sequences)
    candidates |= {name: trainer.step for name, trainer in trainers.items()}
    taken = bench.alternate(candidates, bench.until)
    for trainer in trainers.values():
        trainer.close()
    wanted: dict[str, tuple[str, float | None]] = {
        "padded": ("one run against padded PEFT", _PADDED),
        "sorted": (f"one run against PEFT, sorted by length into micro-batches of {micro} tokens", _SORTED),
        "packed": ("one run against PEFT without padding, all sequences in one row", None),
    }
    best = _fastest(taken, trainers)
    wanted |= {
        name: (f"one run against {name}, without LoRA on the head", _TRL if name == best else None)
        for name in trainers
    }
    note = f"{mixed.num_tokens} tokens, padding ratio {mixed.padding_ratio:.2f}"
    rows = [
        bench.ratio(
            what, taken, name, "engine", num_tokens=mixed.num_tokens, at_least=target, note=note, kind=name
        )
        for name, (what, target) in wanted.items()
    ]
    if not trainers:
        what, why = "one run against TRL SFTTrainer", "trl is not installed"
        rows.append(Row(measurement=bench.measurement, what=what, measured="left out", note=why))
    return [*rows, agreement]


def _trainers(bench: Bench, sequences: Sequence[list[int]]) -> dict[str, TrlRun]:
    """Return TRL's trainer in the settings that run without flash attention; none where TRL is not installed.

    Each holds a model of its own, so a large one has two of them only.
    """
    if not is_installed():
        return {}
    is_small = bench.model.shape.is_saved
    settings = TrlSetting if is_small else (TrlSetting.PADDED, TrlSetting.PACKED_ROWS)
    return {
        f"TRL SFTTrainer, {setting.value}": TrlRun(
            bench.model.plain, sequences, setting, rank=RANKS[0], work_dir=bench.model.directory
        )
        for setting in settings
    }


def _fastest(taken: Taken, names: Iterable[str]) -> str | None:
    """Return which of the candidates that ran took the least time."""
    ran = [name for name in names if name in taken.seconds]
    return min(ran, key=lambda name: median(taken.seconds[name]), default=None)


def _agreement(
    bench: Bench, arrangements: Mapping[str, Sequence[Part]], data: Sequence[tuple[Datum, ...]]
) -> Row:
    """Return how far the losses of the untrained candidates lie apart: they must compute the same."""
    what = "loss of these candidates before training: largest relative difference"
    try:
        losses = [bench.engine.loss(data), *(bench.peft.loss(parts) for parts in arrangements.values())]
    except Exception as error:  # noqa: BLE001 - the timings are worth having without it
        return Row(measurement=bench.measurement, what=what, measured="failed", note=describe(error))
    apart = (max(losses) - min(losses)) / abs(median(losses))
    limit = _LOSS_APART[bench.model.dtype]
    return Row(
        measurement=bench.measurement,
        what=what,
        target=f"<= {limit:g}",
        measured=f"{apart:.2g}",
        is_met=apart <= limit,
    )


def many_runs(bench: Bench) -> Iterator[Row]:
    """Put runs packed together beside PEFT, which takes one after another."""
    cells = [(size, count) for size in bench.plan.tokens_a_run for count in bench.plan.num_runs]
    for (size, count), until in bench.paced(cells):
        yield _runs_cell(bench, size, count, until)


def _runs_cell(bench: Bench, size: int, count: int, until: float) -> Row:
    batches = [bench.batch(4, *_SPREADS[size], seed=seed) for seed in range(count)]
    data = [engine_data(one.sequences()) for one in batches]
    padded = [[pad(one.sequences(), bench.device)] for one in batches]
    taken = bench.alternate(
        {"peft": lambda: bench.peft.step(padded), "engine": lambda: bench.engine.step(data)},
        until,
        warm_ups={"peft": 1},
    )
    return bench.ratio(
        f"{count} {'run' if count == 1 else 'runs'} of {size} tokens against PEFT, one after another",
        taken,
        "peft",
        "engine",
        num_tokens=sum(one.num_tokens for one in batches),
        at_least=_TARGETS.get((bench.label, size)) if count == 8 else None,
        note=f"padding ratio {batches[0].padding_ratio:.2f}",
        runs=count,
        size=size,
    )
