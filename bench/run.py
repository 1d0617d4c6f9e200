"""Runs the measurements on an instance of their own, all in one go: `make bench`, or `python -m bench.run --help`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from bench import measurements
from bench.companion import ROOT, Companion
from bench.engine_alone import in_bfloat16, large_vocabulary, small_in_float32
from bench.fairness import fairness
from bench.full_stack import full_stack
from bench.instance import Instance
from bench.machine import processor
from bench.measurements import Lab, torch_process
from bench.table import Row, is_reached, markdown, write_between_markers
from bench.timing import describe
from mintweb.programs import SPIN_COUNT

MEASUREMENTS: Final[Mapping[str, Callable[[Lab], list[Row]]]] = {
    **measurements.MEASUREMENTS,
    "fairness": fairness,
    "full-stack": full_stack,
    "engine": small_in_float32,
    "engine-bf16": in_bfloat16,
    "engine-151k": large_vocabulary,
}
_PICTURE = "scaling-cpu.png"
_PICTURES, _DOCS_PICTURES = ROOT / "bench" / "out", ROOT / "docs" / "pictures"
_ENVIRONMENTS = ("tinker038", "mint022")
_SHIPPED = ROOT / "gpuworker" / "tiny" / "model"


def main() -> int:
    """Return 0 if everything was measured and every figure with a target was reached."""
    options = _options()
    with (
        tempfile.TemporaryDirectory(prefix="mintweb-bench-") as work_dir,
        _lab(options, Path(work_dir)) as lab,
    ):
        load_before = os.getloadavg()[0]
        rows: list[Row] = []
        for name in options.only or MEASUREMENTS:
            begin = time.monotonic()
            measured = _attempt(name, lab)
            rows += measured
            print(f"{name} took {time.monotonic() - begin:.0f} s", file=sys.stderr)
            for row in measured:
                print(f"  {row.what}: {row.measured} {row.note}", file=sys.stderr)
        machine = _machine(load_before, base_model=lab.base_model)
    table = markdown(rows)
    facts = [f"* {name}: {value}" for name, value in machine.items()]
    print(*facts, "", table, sep="\n")
    content = {"machine": machine, "rounds": options.rounds, "rows": [asdict(row) for row in rows]}
    options.output.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if options.write_docs:
        write_between_markers(ROOT / "docs" / "benchmarks.md", "\n".join([*facts, "", table]))
    if any("sequences" in row.facts for row in rows):
        picture = (_DOCS_PICTURES if options.write_docs else _PICTURES) / _PICTURE
        draw = [sys.executable, "-m", "bench.curves", str(options.output), "--output", str(picture)]
        subprocess.run(draw, cwd=ROOT, check=True)
    return 0 if is_reached(rows) else 1


def _attempt(name: str, lab: Lab) -> list[Row]:
    try:
        return MEASUREMENTS[name](lab)
    except Exception as error:  # noqa: BLE001 - the other measurements must still come to their figures
        traceback.print_exc()
        return [Row(measurement=name, what=name, measured="failed", note=describe(error))]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Measure mintweb.")
    parser.add_argument(
        "--only", action="append", choices=MEASUREMENTS, help="a measurement; may be given more than once"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often the candidates alternate (default: 5)"
    )
    parser.add_argument("--base-model", type=Path, help="a model folder instead of mintweb/tiny")
    parser.add_argument(
        "--write-docs", action="store_true", help="put the table into docs/benchmarks.md and draw its picture"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results.json")
    options = parser.parse_args()
    if not ((options.base_model or _SHIPPED) / "config.json").is_file():
        parser.error(f"{options.base_model or _SHIPPED} holds no config.json")
    for name in _ENVIRONMENTS:
        if not _python(name).is_file():
            parser.error(f"the client environment .venv-{name} is missing: run tests/sdk/make_envs.sh")
    return options


@contextmanager
def _lab(options: argparse.Namespace, work_dir: Path) -> Iterator[Lab]:
    settings = {"MINTWEB_BASE_MODELS": f"bench/model={options.base_model}"} if options.base_model else {}
    threads = str(len(os.sched_getaffinity(0)))
    with ExitStack() as stack:
        instance = stack.enter_context(Instance(work_dir / "data", **settings))
        clients = [
            stack.enter_context(
                Companion(_python(name), "bench.sdk_client", instance.sdk_env, log=work_dir / f"{name}.log")
            )
            for name in _ENVIRONMENTS
        ]
        # Baselines and engine have the threads that a worker has.
        torch_env = {"OMP_NUM_THREADS": threads, "GOMP_SPINCOUNT": SPIN_COUNT, "HF_HUB_OFFLINE": "1"}
        torch_side = stack.enter_context(torch_process(torch_env, log=work_dir / "baselines.log"))
        sizes = torch_side.ask("use_model", directory=str(options.base_model or _SHIPPED))
        yield Lab(
            instance=instance,
            clients={str(client.ask("version")): client for client in clients},
            torch_side=torch_side,
            base_model="bench/model" if options.base_model else "mintweb/tiny",
            vocab_size=sizes["vocab_size"],
            work_dir=work_dir,
            rounds=options.rounds,
            client_python=_python(_ENVIRONMENTS[0]),
            torch_env=torch_env,
        )


def _python(environment: str) -> Path:
    return ROOT / f".venv-{environment}" / "bin" / "python"


def _machine(load_before: float, *, base_model: str) -> dict[str, str]:
    """Return what the figures depend on."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "peft", "trl")},
        "base model": base_model,
        "load average before and after": f"{load_before:.1f}, {os.getloadavg()[0]:.1f}",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # it is left out of the table
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
