"""What a step leaves of the device: its share of the matrix products' own time, and its memory."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Final

from bench.candidates.data import engine_data, pad
from bench.ceiling import Floor, best_matmul
from bench.loaded import Bench
from bench.memory import peak_bytes
from bench.table import Row
from bench.timing import Taken, describe, free

_TARGETS: Final = {"S fp32": 0.55, "M bf16": 0.5, "S bf16": 0.33}
_MIB: Final = 1 << 20


def ceiling(bench: Bench) -> list[Row]:
    """Put the step beside its own frozen matrix products alone, and those beside the device's best product."""
    mixed = bench.batch(bench.plan.num_sequences, 32, 512)
    sequences = mixed.sequences()
    data, padded = [engine_data(sequences)], [[pad(sequences, bench.device)]]
    floor = Floor(bench.model, mixed.num_tokens)
    best_tflops, best_shape = best_matmul(bench.model, mixed.num_tokens)
    taken = bench.alternate(
        {
            "floor": floor.run,
            "engine": lambda: bench.engine.step(data),
            "padded": lambda: bench.peft.step(padded),
        },
        bench.until,
    )
    del floor.products[:]
    rows = [
        Row(
            measurement=bench.measurement,
            what="torch.mm, the fastest of the model's shapes",
            measured=f"{best_tflops:.3g} TFLOP/s",
            note=best_shape,
            facts={"tflops": best_tflops},
        )
    ]
    for name, what in (("engine", "a step of the engine"), ("padded", "a step of padded PEFT")):
        target = _TARGETS.get(bench.label) if name == "engine" and bench.device.type == "cpu" else None
        rows.append(_share(bench, taken, name, what, floor.num_flops, best_tflops, target))
    return rows


def _share(
    bench: Bench, taken: Taken, name: str, what: str, num_flops: int, best_tflops: float, target: float | None
) -> Row:
    what = f"time of the frozen matrix products of the real tokens alone, over {what}"
    if name in taken.errors or "floor" in taken.errors:
        error = taken.errors.get(name) or taken.errors["floor"]
        return Row(measurement=bench.measurement, what=what, measured="failed", note=error)
    seconds = {key: list(taken.seconds[key]) for key in ("floor", name)}
    shares = [one / other for one, other in zip(seconds["floor"], seconds[name], strict=True)]
    tflops = num_flops / median(seconds[name]) / 1e12
    return Row(
        measurement=bench.measurement,
        what=what,
        target="" if target is None else f">= {target}",
        measured=f"{median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})",
        is_met=None if target is None else median(shares) >= target,
        note=f"{tflops:.3g} TFLOP/s of such products, {100 * tflops / best_tflops:.0f} % of torch.mm",
        seconds=seconds,
        facts={"tflops": tflops},
    )


def memory(bench: Bench) -> list[Row]:
    """Return what a step of one run takes beyond weights and adapters."""
    mixed = bench.batch(bench.plan.num_sequences, 32, 512)
    sequences = mixed.sequences()
    data, padded = [engine_data(sequences)], [[pad(sequences, bench.device)]]
    steps: dict[str, Callable[[], object]] = {
        "engine": lambda: bench.engine.step(data),
        "padded PEFT": lambda: bench.peft.step(padded),
    }
    weights = bench.num_parameters * (2 if bench.model.dtype == "bfloat16" else 4)
    rows = []
    for name, step in steps.items():
        free(bench.device)
        try:
            step()
            peak = peak_bytes(step, bench.device)
        except Exception as error:  # noqa: BLE001 - one side's lack of room is a figure too
            measured, note, facts = "failed", describe(error), {}
        else:
            measured, facts = f"{peak / _MIB:.0f} MiB", {"bytes": float(peak)}
            note = f"{mixed.num_tokens} tokens, padding ratio {mixed.padding_ratio:.2f}; frozen weights {weights / _MIB:.0f} MiB"
        what = f"peak memory of a step beyond what lies there before it, {name}"
        rows.append(Row(measurement=bench.measurement, what=what, measured=measured, note=note, facts=facts))
    return rows
