"""`python -m tests.chaos --seed 1 --kills 100`: disturb a whole mintweb under load and print one JSON line.

Exits with 1 when anything was lost, doubled, wrong, or raised in a client; with 2 when the stage itself failed.
The same seed and numbers repeat the same plan of faults; what each of them meets depends on the machine's pace.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tests.chaos import plan as plans
from tests.chaos.load import Entry, Orders, RunLedger
from tests.chaos.nemesis import Nemesis
from tests.chaos.stage import Stage, StageError
from tests.up.instances import free_port

logger = logging.getLogger("chaos")
_ROOT: Final = Path(__file__).resolve().parent.parent.parent
_KEY: Final = "tml-chaos-chaos-chaos"
_MODELS: Final = {"chain": "chaos/chain", "torch": "mintweb/tiny"}
_RANKS: Final = {"chain": 1, "torch": 4}
# Seconds of lease, of heartbeat, and of compute that may have to be replayed: short, so that faults meet each other.
_PACES: Final = {
    "chain": {"lease_s": 2.0, "heartbeat_s": 0.5, "replay_budget_s": 0.05},
    "torch": {"lease_s": 3.0, "heartbeat_s": 0.7, "replay_budget_s": 1.0},
}
_CLIENTS_END_S: Final = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="mintweb-chaos-"))
    is_kept = args.keep
    try:
        _set_environment(folder)
        report = _run(args, folder)
    except StageError:
        logger.exception("the stage failed; logs are in %s", folder / "logs")
        is_kept = True
        return 2
    finally:
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if report["clean"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of workers and the web server")
    parser.add_argument("--zombies", type=int, default=4, help="workers frozen by SIGSTOP and woken later")
    parser.add_argument("--faults", type=int, default=4, help="failures of Redis and PostgreSQL")
    parser.add_argument("--ops", type=int, default=0, help="go on until at least so many operations are done")
    parser.add_argument("--engine", choices=sorted(_MODELS), default="chain")
    parser.add_argument("--runs", type=int, default=16, help="clients at once, each with a run of its own")
    parser.add_argument(
        "--workers", type=int, default=3, help="GPU worker processes; those without runs are spares"
    )
    parser.add_argument("--keep", action="store_true", help="leave the data folder where it is")
    return parser


def _set_environment(folder: Path) -> None:
    """Point this process and all it starts at a fresh data folder, before Django reads its settings."""
    for name in ("DATABASE_URL", "REDIS_URL", "MINTWEB_FAILPOINTS", "MINTWEB_STORAGE_URL"):
        os.environ.pop(name, None)
    model = folder / "chain"
    model.mkdir()
    os.environ |= {
        "DJANGO_SETTINGS_MODULE": "mintweb.settings",
        "MINTWEB_DATA_DIR": str(folder),
        "MINTWEB_PORT": str(free_port()),
        "MINTWEB_API_KEY": _KEY,
        "MINTWEB_BASE_MODELS": f"chaos/chain={model}",
        "MINTWEB_DEVICE": "cpu",
        "MINTWEB_LOG_LEVEL": "INFO",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }


def _run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    stage = Stage(folder, engine=args.engine, num_workers=args.workers, pace=_PACES[args.engine])
    plan = plans.make_plan(args.seed, kills=args.kills, zombies=args.zombies, faults=args.faults)
    with stage.databases():
        _prepare()
        nemesis = Nemesis(stage)
        with stage.programs():
            began = time.monotonic()
            ledgers = _disturbed(args, stage, plan, nemesis)
            seconds = time.monotonic() - began
            stage.end_programs()
            left = _left_behind(stage)
        reference: list[RunLedger] = []
        if args.engine == "torch":
            with stage.programs():
                reference = _undisturbed(args, stage, ledgers)
        return _report(args, plan, nemesis, ledgers, reference, seconds, stage, left)


def _prepare() -> None:
    """Make the tables and the clients' key."""
    import django

    django.setup()
    from django.core.management import call_command
    from django.db import connections

    from runs.services import keys

    call_command("migrate", verbosity=0, interactive=False)
    keys.ensure_key_from_settings()
    connections.close_all()


def _disturbed(
    args: argparse.Namespace, stage: Stage, plan: list[plans.Fault], nemesis: Nemesis
) -> list[RunLedger]:
    """Let clients work while everything of the plan happens to what they work with."""
    stop_file = stage.folder / "stop"
    orders = _orders(args, stage, lengths=[0] * args.runs, name="load")
    client = _start_clients(orders)
    stage.until(lambda: _num_done(orders) > 2 * args.runs, what="the first operations are acknowledged")
    for number, fault in enumerate(plan, 1):
        nemesis.perform(fault)
        if number % 25 == 0:
            logger.info("%s of %s faults, %s operations", number, len(plan), _num_done(orders))
    stage.until(lambda: _num_done(orders) >= args.ops, what=f"{args.ops} operations", patience_s=3600)
    stop_file.touch()
    return _await_clients(stage, client, orders)


def _undisturbed(args: argparse.Namespace, stage: Stage, ledgers: list[RunLedger]) -> list[RunLedger]:
    """Let other clients send the same operations while nothing happens."""
    lengths = [max((entry.seq for entry in ledger.entries), default=1) - 1 for ledger in ledgers]
    orders = _orders(args, stage, lengths=lengths, name="calm")
    return _await_clients(stage, _start_clients(orders), orders)


def _orders(args: argparse.Namespace, stage: Stage, *, lengths: list[int], name: str) -> Orders:
    return Orders(
        port=int(os.environ["MINTWEB_PORT"]),
        key=_KEY,
        seed=args.seed,
        base_model=_MODELS[args.engine],
        rank=_RANKS[args.engine],
        runs=list(range(args.runs)),
        lengths=lengths,
        stop_file=str(stage.folder / "stop"),
        ledger_file=str(stage.folder / f"{name}.ledger"),
    )


def _start_clients(orders: Orders) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.chaos.load", json.dumps(asdict(orders))], cwd=_ROOT)


def _num_done(orders: Orders) -> int:
    counted = Path(orders.ledger_file).with_suffix(".count")
    return int(counted.read_text()) if counted.exists() else 0


def _await_clients(stage: Stage, client: subprocess.Popen[bytes], orders: Orders) -> list[RunLedger]:
    stage.until(
        lambda: client.poll() is not None, what="the clients have their answers", patience_s=_CLIENTS_END_S
    )
    if client.returncode != 0:
        raise StageError(f"the clients ended with {client.returncode}")
    return [
        RunLedger(**row | {key: [Entry(**entry) for entry in row[key]] for key in ("entries", "samples")})
        for row in json.loads(Path(orders.ledger_file).read_text())
    ]


def _left_behind(stage: Stage) -> dict[str, int]:
    """Return what should be zero after a clean end and a sweep: runs held, operations waiting, folders without a row or the reverse."""
    from runs.models import Checkpoint, Snapshot
    from runs.services import state_folders

    ((held,),) = stage.rows("SELECT count(*) FROM runs_trainingrun WHERE worker_id IS NOT NULL")
    ((queued,),) = stage.rows("SELECT count(*) FROM runs_operation WHERE state = 'queued'")
    num_swept = sum(state_folders.delete_orphans(turn=turn) for turn in range(state_folders.NUM_TURNS))
    logger.info("%s folders of dead workers were swept", num_swept)
    storage = stage.folder / "storage"
    found = {
        str(folder.relative_to(storage))
        for kind in ("checkpoints", "snapshots")
        for folder in (storage / kind).glob("*/*")
    }
    named = {row.directory for rows in (Checkpoint.objects.all(), Snapshot.objects.all()) for row in rows}
    return {
        "held": int(held),
        "queued": int(queued),
        "folders": len(found - named),
        "missing": len(named - found),
    }


def _report(
    args: argparse.Namespace,
    plan: list[plans.Fault],
    nemesis: Nemesis,
    ledgers: list[RunLedger],
    reference: list[RunLedger],
    seconds: float,
    stage: Stage,
    left: dict[str, int],
) -> dict[str, Any]:
    from tests.chaos import verdict as verdicts

    if args.engine == "chain":
        verdict, histories = verdicts.of_chains(ledgers, args.seed, _RANKS["chain"])
    else:
        verdict, histories = verdicts.of_adapters(ledgers, reference, args.seed)
    for text in verdict.problems:
        logger.error("%s", text)
    kills = [one for one in nemesis.strikes if one.fault.family == "kill"]
    return {
        "seed": args.seed,
        "plan": plans.digest_of(plan),
        "engine": args.engine,
        "clean": verdict.is_clean and not any(left.values()),
        "seconds": round(seconds, 1),
        "ops": verdict.num_ops,
        "samples": verdict.num_samples,
        "runs": len(ledgers),
        "workers": args.workers,
        "kills": plans.count(plan, "kill"),
        "zombies": plans.count(plan, "zombie"),
        "faults": plans.count(plan, "fault"),
        "not_as_planned": sum(not one.is_as_planned for one in nemesis.strikes),
        "exits": dict(sorted(stage.exits.items())),
        "lost": verdict.num_lost,
        "doubled": verdict.num_doubled,
        "wrong": verdict.num_wrong,
        "diverged": verdict.num_diverged,
        "exceptions": verdict.num_exceptions,
        "left": left,
        "resent": sum(ledger.num_resent for ledger in ledgers),
        # Polls refused in less than half a second in a way that a client repeats at once.
        "instant_refusals": sum(ledger.num_instant_errors for ledger in ledgers),
        "replays": verdict.num_recovered,
        # Where the driver let the runs come back before it went on; and all, where other faults fall into the wait.
        "recovery_s": verdicts.shares(verdicts.recovery_s([k for k in kills if k.has_settled], histories)),
        "recovery_under_fire_s": verdicts.shares(verdicts.recovery_s(kills, histories)),
        "load_average": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    sys.exit(main())
