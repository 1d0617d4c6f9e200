"""What goes wrong and when: the same seed and numbers give the same list of faults."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Final, Literal

Family = Literal["kill", "zombie", "fault"]
# How often each kind is drawn, and whether it is a death, a freeze or a failure of what the product stands on.
_KILLS: Final = {"kill_worker": 50, "kill_at_failpoint": 32, "kill_web": 13, "kill_everything": 5}
_ZOMBIES: Final = {"freeze_worker": 55, "freeze_at_failpoint": 45}
_FAULTS: Final = {
    "redis_flush": 20,
    "redis_kill": 15,
    "redis_restart": 10,
    "postgres_restart": 15,
    "postgres_crash": 15,
    "postgres_kill": 10,
    "postgres_disconnect": 15,
}
_KILL_POINTS: Final = (
    "before_compute",
    "after_compute",
    "before_commit",
    "after_answer",
    "after_commit",
    "snapshot_written",
    "snapshot_renamed",
    "during_replay",
)
_FREEZE_POINTS: Final = ("after_compute", "before_commit", "after_answer", "after_commit", "snapshot_renamed")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong.

    `delay_s` after the one before; `settles` when the next one waits until all runs that it hit go on. The worker
    that holds the `rank`-th most runs is hit; `failpoint` says where it dies or freezes; `lasts_s` is how long a
    frozen process sleeps, or a server stays away.
    """

    family: Family
    kind: str
    delay_s: float
    settles: bool
    rank: int = 0
    failpoint: str = ""
    lasts_s: float = 0.0


def make_plan(seed: int, *, kills: int, zombies: int, faults: int) -> list[Fault]:
    """Return so many faults of each family, mixed."""
    rng = random.Random(f"plan {seed}")
    families: list[Family] = [*["kill"] * kills, *["zombie"] * zombies, *["fault"] * faults]  # type: ignore[list-item]
    rng.shuffle(families)
    return _with_rests([_MAKERS[family](rng) for family in families])


def _with_rests(plan: list[Fault]) -> list[Fault]:
    """Let what goes on settle after two faults in a row: what takes four workers down with it is given up as poison."""
    rested: list[Fault] = []
    for fault in plan:
        tired = len(rested) > 1 and not (rested[-1].settles or rested[-2].settles)
        rested.append(replace(fault, settles=fault.settles or tired))
    return rested


def digest_of(plan: list[Fault]) -> str:
    """Return a short name for a plan: equal plans have equal names."""
    content = json.dumps([asdict(fault) for fault in plan], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def count(plan: list[Fault], family: Family) -> dict[str, int]:
    """Return how many faults of each kind the plan has."""
    return dict(sorted(Counter(fault.kind for fault in plan if fault.family == family).items()))


def _kill(rng: random.Random) -> Fault:
    kind = _draw(rng, _KILLS)
    point = f"{rng.choice(_KILL_POINTS)}:kill@{rng.choice((1, 1, 2, 3, 7))}"
    return Fault(
        family="kill",
        kind=kind,
        delay_s=_delay(rng),
        settles=rng.random() < 0.5,
        rank=rng.choice((0, 0, 0, 1)),
        failpoint=point if kind == "kill_at_failpoint" else "",
    )


def _zombie(rng: random.Random) -> Fault:
    kind = _draw(rng, _ZOMBIES)
    point = f"{rng.choice(_FREEZE_POINTS)}:stop@{rng.choice((1, 1, 2, 5))}"
    return Fault(
        family="zombie",
        kind=kind,
        delay_s=_delay(rng),
        settles=False,
        failpoint=point if kind == "freeze_at_failpoint" else "",
        # As shares of a lease: most wake long after it ran out, some just before.
        lasts_s=rng.choice((0.5, 1.5, 1.8, 2.2)),
    )


def _fault(rng: random.Random) -> Fault:
    kind = _draw(rng, _FAULTS)
    return Fault(
        family="fault",
        kind=kind,
        delay_s=_delay(rng),
        settles=rng.random() < 0.3,
        lasts_s=round(rng.choice((0.0, 0.0, 0.3, 1.5)), 3),
    )


def _delay(rng: random.Random) -> float:
    return round(rng.uniform(0.02, 0.5), 3)


def _draw(rng: random.Random, weights: dict[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


_MAKERS: Final[dict[Family, Callable[[random.Random], Fault]]] = {
    "kill": _kill,
    "zombie": _zombie,
    "fault": _fault,
}
