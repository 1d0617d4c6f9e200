"""`python -m tests.chaos.sweep`: break every single call to PostgreSQL, the disk and Redis, one a pass, and judge each pass.

First one pass in which nothing is broken counts the calls of each kind. Then, for each kind, each n and each mode,
the n-th call fails: once, or after it was done (its answer is lost), or from then on until that process is ended
and a fresh one is started. Prints one JSON line, and exits with 1 if any pass was not clean.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.chaos.sweep_calls import KINDS, MODES, Fault, is_at

if TYPE_CHECKING:
    from tests.chaos.sweep_case import Outcome

logger = logging.getLogger("sweep")
_SHOWN: Final = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="mintweb-sweep-"))
    try:
        _set_environment(folder)
        from tests.chaos import sweep_stage

        with sweep_stage.databases(folder):
            report = _sweep(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if report["clean"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.sweep", description=__doc__)
    parser.add_argument("--kind", action="append", choices=KINDS, help="only these kinds (all)")
    parser.add_argument("--call", type=int, action="append", help="only these n (all)")
    parser.add_argument(
        "--mode", action="append", choices=("once", "lost", "forever"), help="only these (all)"
    )
    parser.add_argument(
        "--sites", action="store_true", help="only the first call from each place in the code"
    )
    parser.add_argument("--at", action="append", default=[], help="only calls whose text or place holds this")
    parser.add_argument("--every", type=int, default=1, help="only each k-th pass of the list")
    parser.add_argument("--jobs", type=int, default=2, help="passes at once, each with a database of its own")
    parser.add_argument("--repeat", type=int, default=1, help="try each pass so often")
    return parser


def _set_environment(folder: Path) -> None:
    """Point this process and all it starts at a fresh data folder, before Django reads its settings."""
    from tests.chaos.sweep_processes import API_KEY

    for name in ("DATABASE_URL", "REDIS_URL", "MINTWEB_FAILPOINTS", "MINTWEB_STORAGE_URL"):
        os.environ.pop(name, None)
    (folder / "chain").mkdir()
    os.environ |= {
        "DJANGO_SETTINGS_MODULE": "mintweb.settings",
        "MINTWEB_DATA_DIR": str(folder),
        "MINTWEB_API_KEY": API_KEY,
        "MINTWEB_BASE_MODELS": f"chaos/chain={folder / 'chain'}",
        "MINTWEB_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def _sweep(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from tests.chaos import sweep_stage

    began = time.monotonic()
    with sweep_stage.places(folder, jobs=args.jobs) as passes:
        (calm,) = passes([None])
        calls = _calls_by_kind(calm)
        faults = _faults(args, calls)
        logger.info("%s passes; calls: %s", len(faults), {kind: len(made) for kind, made in calls.items()})
        outcomes = []
        if calm.problems:
            logger.error("the undisturbed pass fails: %s\n%s", calm.problems, calm.logs)
        else:
            for outcome in passes(faults):
                outcomes.append(outcome)
                _tell(outcome, len(outcomes))
    return _report(calm, outcomes, calls, time.monotonic() - began)


def _calls_by_kind(calm: Outcome) -> dict[str, list[dict[str, Any]]]:
    return {
        kind: [
            call
            for call in calm.calls.get(kind.partition("-")[0], [])
            if call["library"] == kind.partition("-")[2]
        ]
        for kind in KINDS
    }


def _faults(args: argparse.Namespace, calls: dict[str, list[dict[str, Any]]]) -> list[Fault]:
    """Return what is to be broken, one a pass."""
    found: list[Fault] = [
        Fault(kind=kind, call=call, mode=mode, at=tuple(args.at))
        for kind, made in calls.items()
        if not args.kind or kind in args.kind
        for call in _numbers(made, at=args.at, are_firsts=args.sites)
        if not args.call or call in args.call
        for mode in MODES[kind.partition("-")[2]]
        if not args.mode or mode in args.mode
    ]
    chosen = found[:: args.every]
    return [fault for fault in chosen for _ in range(args.repeat)]


def _numbers(made: Sequence[dict[str, Any]], *, at: Sequence[str], are_firsts: bool) -> list[int]:
    """Return the numbers, among the calls that hold all these texts, of all or of the first from each place."""
    chosen = [call for call in made if is_at(call, at)]
    first: dict[tuple[str, ...], int] = {}
    for number, call in enumerate(chosen, 1):
        first.setdefault(_site(call), number)
    return sorted(first.values()) if are_firsts else list(range(1, len(chosen) + 1))


def _tell(outcome: Outcome, number: int) -> None:
    fault = outcome.fault
    assert fault is not None
    if number % 25 == 0:
        logger.info("%s passes", number)
    if outcome.problems:
        what = outcome.blown and f"{outcome.blown['what'][:200]} from {outcome.blown['stack']}"
        logger.error(
            "%s %s %s (%s):\n  %s", fault.kind, fault.call, fault.mode, what, "\n  ".join(outcome.problems)
        )
        logger.info("%s", outcome.logs)


def _report(
    calm: Outcome, outcomes: Sequence[Outcome], calls: dict[str, list[dict[str, Any]]], seconds: float
) -> dict[str, Any]:
    blown = [one for one in outcomes if one.blown is not None]
    bad = [one for one in [calm, *outcomes] if one.problems]
    broken = {_site(one.blown) for one in blown if one.blown is not None}
    return {
        "clean": not bad,
        "seconds": round(seconds, 1),
        "ops": calm.num_ops,
        "calls": {kind: len(made) for kind, made in calls.items()},
        "passes": dict(Counter(one.fault.mode for one in outcomes if one.fault is not None)),
        # A pass in which the process made fewer calls than in the one that counted them.
        "not_reached": len(outcomes) - len(blown),
        # Places in the product from which calls are made, and those of them whose call was broken at least once.
        "sites": len({_site(call) for made in calls.values() for call in made}),
        "sites_broken": len(broken),
        "restarts": sum(not text.endswith(" 0") for one in outcomes for text in one.exits),
        "failed_cleanly": dict(
            Counter(text.partition(":")[0] for one in outcomes for text in one.failed_cleanly)
        ),
        "slowest_s": round(max((one.seconds for one in outcomes), default=calm.seconds), 1),
        "failures": len(bad),
        "first_failures": [_described(one) for one in bad[:_SHOWN]],
    }


def _site(call: dict[str, Any]) -> tuple[str, ...]:
    return (call["library"], *call["stack"])


def _described(outcome: Outcome) -> dict[str, Any]:
    fault = vars(outcome.fault) if outcome.fault is not None else {}
    return {**fault, "broken": outcome.blown, "problems": outcome.problems[:_SHOWN]}


if __name__ == "__main__":
    sys.exit(main())
