"""What a step leaves of the device: the share that its matrix products alone have of its time, and its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

from bench.candidates.data import engine_data, pad
from bench.ceiling import Floor, best_matmul
from bench.loaded import Bench
from bench.memory import peak_bytes
from bench.table import Row, range_row
from bench.timing import Taken, describe, free

_TARGETS: Final = {"S fp32": 0.7, "M bf16": 0.65, "S bf16": 0.45}
_LARGE_VOCABULARY: Final = 151_936
_MEMORY_TARGET: Final = 0.35
_STEPS: Final = 4  # by then the engine has recorded on a GPU what it will
_MIB: Final = 1 << 20


def ceiling(bench: Bench) -> list[Row]:
    """Put the step beside its own frozen matrix products alone, and those beside the device's best product.

    The target is for the products as the engine computes them: torch.mm may take longer over the same ones.
    """
    mixed = bench.mixed_lengths()
    sequences = mixed.sequences()
    data, padded = [engine_data(sequences)], [[pad(sequences, bench.device)]]
    floor = Floor(bench.model, mixed.num_tokens)
    best_tflops, best_name = best_matmul(bench.model, mixed.num_tokens)
    taken = bench.alternate(
        {
            "floor": floor.run,
            "mm floor": floor.run_mm,
            "engine": lambda: bench.engine.step(data),
            "padded": lambda: bench.peft.step(padded),
        },
        bench.until,
    )
    del floor.products[:]
    rows = [
        Row(
            measurement=bench.measurement,
            what="the fastest product of the model's shapes",
            measured=f"{best_tflops:.3g} TFLOP/s",
            note=best_name,
            facts={"tflops": best_tflops},
        )
    ]
    target = _TARGETS.get(bench.label) if bench.device.type == "cpu" else None
    for of, name, at_least in (
        ("floor", "engine", target),
        ("mm floor", "engine", None),
        ("floor", "padded", None),
    ):
        rows.append(_share(bench, taken, of, name, floor.num_flops / best_tflops / 1e12, at_least))
    return rows


def _share(bench: Bench, taken: Taken, of: str, name: str, best_s: float, at_least: float | None) -> Row:
    """Return the share that the matrix products have of a step; `best_s` is their time at the best rate."""
    how = " by torch.mm" if of == "mm floor" else ""
    step = "padded PEFT" if name == "padded" else "the engine"
    what = f"time of the frozen matrix products of the real tokens alone{how}, over a step of {step}"
    for part in (name, of):
        if part in taken.errors:
            return Row(measurement=bench.measurement, what=what, measured="failed", note=taken.errors[part])
    seconds = {key: list(taken.seconds[key]) for key in (of, name)}
    return range_row(
        bench.measurement,
        what,
        [one / other for one, other in zip(seconds[of], seconds[name], strict=True)],
        at_least=at_least,
        note=f"the step is at {100 * best_s / median(seconds[name]):.0f} % of the fastest product's rate",
        seconds=seconds,
    )


def memory(bench: Bench) -> list[Row]:
    """Return what a step of one run takes beyond weights and adapters, and the engine's part of PEFT's."""
    mixed = bench.mixed_lengths()
    sequences = mixed.sequences()
    data, padded = [engine_data(sequences)], [[pad(sequences, bench.device)]]
    steps: dict[str, Callable[[], object]] = {
        "engine": lambda: bench.engine.step(data),
        "padded PEFT": lambda: bench.peft.step(padded),
    }
    weights = bench.num_parameters * (2 if bench.model.dtype == "bfloat16" else 4)
    note = f"{mixed.num_tokens} tokens, padding ratio {mixed.padding_ratio:.2f}; frozen weights {weights / _MIB:.0f} MiB"
    what = "peak memory of a step beyond what lies there before it"
    rows, peaks = [], []
    for name, step in steps.items():
        free(bench.device)
        try:
            step()
            bench.engine.forget_recorded()
            peaks.append(peak_bytes(lambda: [step() for _ in range(_STEPS)], bench.device))  # noqa: B023 - called at once
        except Exception as error:  # noqa: BLE001 - one side's lack of room is a figure too
            measured, of, facts = "failed", describe(error), {}
        else:
            measured, of, facts = f"{peaks[-1] / _MIB:.0f} MiB", note, {"bytes": float(peaks[-1])}
        rows.append(
            Row(
                measurement=bench.measurement,
                what=f"{what}, {name}",
                measured=measured,
                note=of,
                facts=facts,
            )
        )
    if len(peaks) == len(steps):
        rows.append(_memory_ratio(bench, f"{what}, engine over padded PEFT", peaks, note))
    return rows


def _memory_ratio(bench: Bench, what: str, peaks: Sequence[int], note: str) -> Row:
    vocab_size = bench.model.shape.vocab_size
    return range_row(
        bench.measurement,
        what,
        [peaks[0] / peaks[1]],
        at_most=_MEMORY_TARGET if vocab_size == _LARGE_VOCABULARY else None,
        note=f"vocabulary {vocab_size}; {note}",
    )
