from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from bench import engine_alone
from bench.fairness import Step, jain_index, served_shares
from bench.table import Row, is_reached, range_row
from bench.timing import alternate

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = ("--rounds", "1", "--sequences", "2", "--runs", "1", "8", "--tokens", "60", "--samples", "1", "8")
START = datetime(2026, 1, 1, tzinfo=UTC)


def measure(module: str, options: Sequence[str], output: Path) -> list[dict[str, Any]]:
    """Return the rows of a measurement; it may miss its targets, which depend on the machine, but not fail."""
    process = subprocess.run(
        [sys.executable, "-m", module, *options, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode in (0, 1), process.stderr
    assert "Traceback" not in process.stderr, process.stderr
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"]
    assert [row for row in rows if row["measured"] == "failed"] == []
    return rows


def figures(rows: Sequence[dict[str, Any]]) -> str:
    return "\n".join(row["what"] for row in rows)


def test_every_measure_of_the_engine_gives_its_figures(tmp_path: Path) -> None:
    rows = measure("bench.engine_bench", ["--shape", "tiny", "--mixes", "3", *SMALL], tmp_path / "rows.json")
    for wanted in (
        "one run against padded PEFT",
        "one run against PEFT, sorted by length",
        "one run against TRL SFTTrainer",
        "loss of these candidates",
        "frozen matrix products of the real tokens alone, over a step of the engine",
        "engine over padded PEFT",
        "8 runs of 60 tokens against PEFT",
        "sampling 8 sequences with 4 adapters together, against generate for each adapter",
        "16 samples of a prompt of 256 tokens, against 16 requests with prompts of their own",
        "first token of the new weights, over one decode step",
    ):
        assert wanted in figures(rows)
    (bits,) = [row for row in rows if row["what"].startswith("gradients and log-probabilities")]
    assert bits["measured"] == "same bits in 3 of 3"


def test_measures_in_bfloat16_give_their_figures(tmp_path: Path) -> None:
    some = ("--dtype", "bfloat16", "--only", "ceiling", "--only", "memory", "--only", "mixes", "--mixes", "3")
    rows = measure("bench.engine_bench", ["--shape", "tiny", *some, *SMALL], tmp_path / "rows.json")
    assert {row["measurement"] for row in rows} == {"engine, tiny bf16"}
    assert rows[-1]["measured"] == "same bits in 3 of 3"


def test_bfloat16_is_left_out_where_the_processor_has_no_products_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_alone, "has_bfloat16_products", lambda: False)
    rows = engine_alone.in_bfloat16(cast(Any, None))  # nothing is started
    assert [(row.measurement, row.measured) for row in rows] == [
        ("engine, M bf16", "left out"),
        ("engine, S bf16", "left out"),
    ]
    assert is_reached(rows)


@pytest.mark.e2e
def test_a_measurement_on_an_instance_gives_its_figures(tmp_path: Path) -> None:
    rows = measure("bench.run", ["--rounds", "1", "--only", "exactness"], tmp_path / "rows.json")
    assert [row["is_met"] for row in rows] == [True] * 3
    facts = json.loads((tmp_path / "rows.json").read_text())["machine"]
    assert {"processor", "torch", "transformers", "peft", "load average before and after"} <= set(facts)


def test_a_candidate_that_fails_is_named_and_takes_no_other_along() -> None:
    def fail() -> float:
        raise ValueError("no such thing")

    taken = alternate({"good": lambda: 0.0, "bad": fail}, rounds=2, device=CPU)
    assert taken.errors == {"bad": "ValueError: no such thing"}
    assert len(taken.seconds["good"]) == 2


@pytest.mark.parametrize(
    ("at_least", "at_most", "target", "is_met"),
    [
        (None, None, "", None),
        (1.5, None, ">= 1.5 x", True),
        (2.5, None, ">= 2.5 x", False),
        (None, 2.5, "<= 2.5 x", True),
        (None, 1.5, "<= 1.5 x", False),
    ],
)
def test_a_figure_is_judged_by_its_median(
    at_least: float | None, at_most: float | None, target: str, is_met: bool | None
) -> None:
    row = range_row("it", "what", [9.0, 1.0, 2.0], unit="x", at_least=at_least, at_most=at_most)
    assert (row.measured, row.target, row.is_met) == ("2.00 x (1.00 to 9.00)", target, is_met)


@pytest.mark.parametrize(
    ("measured", "is_met", "is_good"),
    [("1 x", True, True), ("1 x", None, True), ("1 x", False, False), ("failed", None, False)],
)
def test_a_missed_target_and_a_failure_are_both_told(
    measured: str, is_met: bool | None, is_good: bool
) -> None:
    good = Row(measurement="it", what="what", measured="1 x")
    odd = Row(measurement="it", what="what", measured=measured, is_met=is_met)
    assert is_reached([good, odd]) is is_good


def step(num_tokens: int, asked_s: float, served_s: float) -> Step:
    return Step(num_tokens, START + timedelta(seconds=asked_s), START + timedelta(seconds=served_s))


def test_shares_are_counted_while_all_runs_want_more() -> None:
    quick = [
        step(10, 0, 1),
        step(10, 2, 3),
        step(10, 2, 5),
    ]  # its first step was served before the other asked
    slow = [step(100, 2, 4), step(100, 2, 9)]
    assert served_shares([quick, slow]) == [1.0, 0.5]


def test_jain_index_of_even_and_of_uneven_shares() -> None:
    assert jain_index([0.5, 0.5, 0.5, 0.5]) == pytest.approx(1.0)
    assert jain_index([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
