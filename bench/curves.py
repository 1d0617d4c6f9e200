"""Draws the scaling curves of results: `python -m bench.curves RESULTS.json ... --output PICTURE.png`.

Speed of 1 to 8 runs and of sampling, the engine beside PEFT, for each model what was measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any, Final

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_OURS, _THEIRS = "#1f5fbf", "#b4530a"
_MARKS: Final = ("o", "s", "^")


def main() -> None:
    """Draw the results named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.curves", description="Draw scaling curves.")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    draw([row for content in contents for row in content["rows"]], _device(contents[0]), options.output)


def draw(rows: Sequence[dict[str, Any]], device: str, output: Path) -> None:
    """Draw every model that has several points of many runs or of sampling."""
    panels = [
        (label, axis)
        for label in dict.fromkeys(row["measurement"] for row in rows)
        for axis in _PANELS
        if _has_curve(rows, label, axis)
    ]
    if not panels:
        raise SystemExit("no model has several points of runs or of sampling")
    num_columns = min(2, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(10, 3.8 * num_rows), squeeze=False, layout="constrained"
    )
    for (label, axis), place in zip_longest(panels, axes.flat, fillvalue=(None, None)):
        if label is None:
            place.remove()
            continue
        own = [row for row in rows if row["measurement"] == label and row["seconds"] and axis in row["facts"]]
        _PANELS[axis](place, own, label.removeprefix("engine, "))
    figure.suptitle(f"Tokens a second on {device}", fontsize=12)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130, facecolor="white")


def _draw_runs(axes: Axes, rows: Sequence[dict[str, Any]], label: str) -> None:
    sizes = sorted({int(row["facts"]["size"]) for row in rows})
    for mark, size in zip(_MARKS, sizes, strict=False):
        own = sorted((r for r in rows if r["facts"]["size"] == size), key=lambda row: row["facts"]["runs"])
        counts = [row["facts"]["runs"] for row in own]
        axes.plot(
            counts, _speeds(own, "engine"), f"-{mark}", color=_OURS, label=f"engine, {size} tokens a run"
        )
        axes.plot(
            counts, _speeds(own, "peft"), f"--{mark}", color=_THEIRS, label=f"PEFT, {size} tokens a run"
        )
    _finish(axes, f"{label}: training steps of several runs", "runs on one base model")


def _draw_sampling(axes: Axes, rows: Sequence[dict[str, Any]], label: str) -> None:
    kinds = {
        "generate": ("generate, one adapter for all", ":^"),
        "per_adapter": ("generate, adapter after adapter", "--s"),
    }
    rows = sorted(rows, key=lambda row: row["facts"]["sequences"])
    ours = {row["facts"]["sequences"]: row for row in rows}
    axes.plot(
        list(ours), _speeds(list(ours.values()), "engine"), "-o", color=_OURS, label="engine, adapters mixed"
    )
    for kind, (name, style) in kinds.items():
        own = [row for row in rows if kind in row["seconds"]]
        counts = [row["facts"]["sequences"] for row in own]
        axes.plot(counts, _speeds(own, kind), style, color=_THEIRS, label=name)
    _finish(axes, f"{label}: sampling", "sequences together")


_PANELS: Final = {"runs": _draw_runs, "sequences": _draw_sampling}
"""What is drawn of a model, by the fact that its x axis shows."""


def _speeds(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [row["facts"]["tokens"] / median(row["seconds"][name]) for row in rows]


def _finish(axes: Axes, title: str, x_label: str) -> None:
    counts = sorted({float(x) for line in axes.get_lines() for x in line.get_xdata()})
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel("tokens/s")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:g}" for count in counts])
    axes.set_ylim(0, 1.45 * axes.get_ylim()[1])  # room for the legend
    axes.grid(visible=True, color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)


def _has_curve(rows: Sequence[dict[str, Any]], label: str, axis: str) -> bool:
    own = [row["facts"] for row in rows if row["measurement"] == label and row["seconds"]]
    return len({facts[axis] for facts in own if axis in facts}) > 1


def _device(content: dict[str, Any]) -> str:
    device = str(content["machine"].get("device") or content["machine"].get("processor"))
    return device.split(" (")[0]


if __name__ == "__main__":
    main()
