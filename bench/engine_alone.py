"""`bench.engine_bench` as part of `make bench`: each shape in a process of its own, its rows in the same table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.companion import ROOT
from bench.measurements import Lab
from bench.table import Row
from gpuworker.engine.precision import has_bfloat16_products


def small_in_float32(lab: Lab) -> list[Row]:
    """Return every measure of shape S in float32."""
    return _measure(lab, "S", "float32", "--budget-s", "540", "--sequences", "8")


def in_bfloat16(lab: Lab) -> list[Row]:
    """Return one run, many runs and the matrix products of shapes M and S in bfloat16, the bits and parts of S."""
    some = ("--only", "one-run", "--only", "ceiling", "--only", "many-runs", "--runs", "8")
    parts = ("--only", "mixes", "--only", "ablation")
    return [
        *_measure(lab, "M", "bfloat16", "--budget-s", "240", "--sequences", "4", *some, "--tokens", "60"),
        *_measure(lab, "S", "bfloat16", "--budget-s", "240", "--sequences", "8", *some, *parts),
    ]


def large_vocabulary(lab: Lab) -> list[Row]:
    """Return the memory of a step of shape S with the vocabulary of Qwen3, in both dtypes."""
    options = ("--only", "memory", "--sequences", "4")
    return [row for dtype in ("float32", "bfloat16") for row in _measure(lab, "S-151k", dtype, *options)]


def _measure(lab: Lab, shape: str, dtype: str, *options: str) -> list[Row]:
    if dtype == "bfloat16" and not has_bfloat16_products():
        why = "the processor has no bfloat16 products; the engine chooses float32 here"
        return [Row(measurement=f"engine, {shape} bf16", what="in bfloat16", measured="left out", note=why)]
    output = lab.work_dir / f"engine-{shape}-{dtype}.json"
    command = [sys.executable, "-m", "bench.engine_bench", "--shape", shape, "--dtype", dtype, *options]
    rounds = ["--rounds", str(lab.rounds), "--output", str(output)]
    environment = {**os.environ, **lab.torch_env}
    process = subprocess.run(
        [*command, *rounds], cwd=ROOT, env=environment, check=False, stdout=subprocess.DEVNULL
    )
    if process.returncode not in (0, 1):  # 1: a figure missed its target or is not there, which its row says
        raise RuntimeError(f"bench.engine_bench ended with {process.returncode}")
    return _read(output)


def _read(output: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(output.read_text(encoding="utf-8"))["rows"]]
