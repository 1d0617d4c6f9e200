"""What each run's client does: an endless list of operations that a seed fixes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from tests.chaos.chain import Example

Kind = Literal[
    "forward_backward", "forward", "optim_step", "save", "save_for_sampler", "save_for_session", "load"
]
_SHARES: Final[dict[Kind, float]] = {
    "forward_backward": 0.55,
    "forward": 0.08,
    "optim_step": 0.335,
    "save": 0.01,
    "save_for_sampler": 0.005,
    "save_for_session": 0.01,
    "load": 0.01,
}
FINAL_NAME: Final = "final"


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation; a load names an earlier save of the same run, a save for a session the session's number."""

    kind: Kind
    examples: tuple[Example, ...] = ()
    learning_rate: float = 0.0
    name: str = ""
    optimizer: bool = False


FINAL_SAVE: Final = Op(kind="save", name=FINAL_NAME)


def script(seed: int, run: int) -> Iterator[Op]:
    """Yield the run's operations; those of seq 1, 2, 3, ..."""
    rng = random.Random(f"{seed}/{run}")
    saved: list[str] = []
    num_sessions = 0
    kinds, shares = list(_SHARES), list(_SHARES.values())
    while True:
        kind = rng.choices(kinds, shares)[0]
        if kind == "load" and not saved:
            kind = "save"
        if kind in ("forward", "forward_backward"):
            yield Op(kind=kind, examples=tuple(_example(rng) for _ in range(rng.randint(1, 2))))
        elif kind == "optim_step":
            yield Op(kind=kind, learning_rate=rng.randint(1, 40) / 4096)
        elif kind == "load":
            yield Op(kind=kind, name=rng.choice(saved[-3:]), optimizer=rng.random() < 0.6)
        elif kind == "save_for_session":
            num_sessions += 1
            yield Op(kind=kind, name=str(num_sessions))
        else:
            name = f"{kind.replace('_', '-')}-{len(saved)}-{rng.randrange(10**9)}"
            if kind == "save":
                saved.append(name)
            yield Op(kind=kind, name=name)


def lora_seed(seed: int, run: int) -> int:
    """Return the seed of a run's first weights."""
    return seed * 1000 + run


def _example(rng: random.Random) -> Example:
    count = rng.randint(3, 10)
    return Example(
        tokens=tuple(rng.randrange(200) for _ in range(count)),
        targets=tuple(rng.randrange(200) for _ in range(count)),
        weights=tuple(rng.choice((0.25, 0.5, 1.0)) for _ in range(count)),
    )
