"""Measures the engine alone beside transformers and PEFT: `python -m bench.engine_bench --help`.

Needs torch, transformers and PEFT only, so it runs where the rest of the product is not installed;
`bench/gpu.sh` calls it on a machine with a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
import transformers

from bench.ablation import ablation
from bench.hardware_measures import ceiling, memory
from bench.loaded import Bench, Plan
from bench.machine import processor
from bench.mixes import mixes
from bench.new_weights import new_weights
from bench.recorded import recorded
from bench.sampling_measures import sampling
from bench.shapes import SHAPES, RandomModel
from bench.table import Row, is_reached, markdown
from bench.timing import describe, free
from bench.training_measures import many_runs, one_run

MEASURES: Final[Mapping[str, Callable[[Bench], Iterable[Row]]]] = {
    "one-run": one_run,
    "ceiling": ceiling,
    "memory": memory,
    "many-runs": many_runs,
    "sampling": sampling,
    "new-weights": new_weights,
    "mixes": mixes,
    "recorded": recorded,
    "ablation": ablation,
}
_ONLY_ON: Final = {"mixes": "cpu", "recorded": "cuda"}
"""Measures that mean something on one kind of device: equal bits are promised on a CPU, launches are recorded on a GPU."""
_FOREVER: Final = 1e9


def main() -> int:
    """Return 0 if everything was measured and every figure with a target was reached."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="mintweb-bench-") as work_dir:
        rows = measure(options, Path(work_dir))
    facts = [f"* {name}: {value}" for name, value in machine(options).items()]
    print(*facts, "", markdown(rows), sep="\n")
    return 0 if is_reached(rows) else 1


def measure(options: argparse.Namespace, work_dir: Path) -> list[Row]:
    """Return the rows of all measures; they are also written one by one, so that an abort loses little."""
    begin = time.monotonic()
    ends = begin + (options.budget_s or _FOREVER)
    model = RandomModel(options.shape, work_dir, device=options.device, dtype=options.dtype)
    plan = Plan(
        num_sequences=options.sequences,
        num_runs=options.runs,
        tokens_a_run=options.tokens,
        num_samples=options.samples,
        num_mixes=options.mixes,
        rounds=options.rounds,
    )
    bench = Bench(options.shape, model, plan, until=ends)
    print(f"{bench.label}: loaded after {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    rows: list[Row] = []
    _write(options, rows)
    names = options.only or [
        name for name in MEASURES if _ONLY_ON.get(name, options.device) == options.device
    ]
    for number, name in enumerate(names):
        started = time.monotonic()
        bench.until = started + (ends - started) / (len(names) - number)
        for row in _attempt(bench, name, is_late=started > ends):
            rows.append(row)
            _write(options, rows)
            print(f"  {row.what}: {row.measured} {row.note}", file=sys.stderr, flush=True)
        free(bench.device)
        print(f"{bench.label}: {name} took {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


def machine(options: argparse.Namespace) -> Mapping[str, str]:
    """Return what the figures depend on."""
    is_gpu = options.device == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": torch.cuda.get_device_name() if is_gpu else processor(),
        "threads": str(torch.get_num_threads()),
        "python, torch, transformers": f"{platform.python_version()}, {torch.__version__}, {transformers.__version__}",
    }


def _attempt(bench: Bench, name: str, *, is_late: bool) -> Iterator[Row]:
    if is_late:
        yield Row(measurement=bench.measurement, what=name, measured="left out", note="the time was up")
        return
    try:
        yield from MEASURES[name](bench)
    except Exception as error:  # noqa: BLE001 - the other measures must still come to their figures
        yield Row(measurement=bench.measurement, what=name, measured="failed", note=describe(error))


def _write(options: argparse.Namespace, rows: list[Row]) -> None:
    if options.output:
        content = {"machine": machine(options), "rows": [asdict(row) for row in rows]}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine_bench", description="Measure the engine alone."
    )
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--only", action="append", choices=MEASURES, help="a measure; may be given more than once"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often the candidates alternate")
    parser.add_argument(
        "--sequences", type=int, default=16, help="sequences of 32 to 512 tokens of the one run"
    )
    parser.add_argument("--runs", type=int, nargs="+", choices=(1, 2, 4, 8), default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", choices=(60, 230, 1000), default=[60, 230])
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[1, 8, 32], help="sequences sampled together"
    )
    parser.add_argument("--mixes", type=int, default=40, help="random mixes of runs to compare bits in")
    parser.add_argument("--threads", type=int, help="threads of the CPU")
    parser.add_argument(
        "--budget-s", type=float, help="add no rounds and begin no measure after so many seconds"
    )
    parser.add_argument("--output", type=Path, help="a JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
