"""Every measurement: what is put beside what, for how long, and which figure is wanted.

Candidates alternate within a measurement, so that a machine that gets slower meanwhile slows all of them.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Final

import psycopg

from bench.batches import Batch
from bench.companion import Companion
from bench.instance import Instance
from bench.recipe_runs import Finished, Recipes
from bench.table import Row, limit_row, ratio_row
from mintweb import embedded

_RANK: Final = 16
_ODD_RANK: Final = 24  # alpha / rank is no power of two, so that scaling rounds
_AHEAD: Final = 4
_RANKS_OF_EIGHT: Final = (16, 8, 32, 16, 8, 16, 32, 4)


@dataclass(frozen=True, kw_only=True)
class Lab:
    """What the measurements work with: a running mintweb, an SDK process per client version, a torch process."""

    instance: Instance
    clients: Mapping[str, Companion]
    torch_side: Companion
    base_model: str
    vocab_size: int
    work_dir: Path
    rounds: int
    client_python: Path
    torch_env: Mapping[str, str]

    def batch(
        self, num_sequences: int, shortest: int, longest: int, *, seed: int = 0, vocab_size: int | None = None
    ) -> Batch:
        """Return a batch within the model's vocabulary, or another's."""
        return Batch(
            num_sequences=num_sequences,
            shortest=shortest,
            longest=longest,
            seed=seed,
            vocab_size=vocab_size or self.vocab_size,
        )

    def open_torch_side(self) -> Companion:
        """Return a further process of torch on all cores."""
        return torch_process(self.torch_env, log=self.work_dir / "torch.log")

    def open_run(self, client: str, name: str, *, rank: int = _RANK, seed: int = 1) -> str:
        """Create a run through a client and return its id."""
        return str(
            self.clients[client].ask("open_run", name=name, base_model=self.base_model, rank=rank, seed=seed)
        )

    @property
    def newest(self) -> str:
        """The newest client's version."""
        return next(iter(self.clients))

    @property
    def oldest(self) -> str:
        """The oldest client's version."""
        return list(self.clients)[-1]


def torch_process(env: Mapping[str, str], *, log: Path) -> Companion:
    """Return a process with the baselines and the engine alone."""
    return Companion(Path(sys.executable), "bench.baselines", env, log=log)


def round_trip(lab: Lab) -> list[Row]:
    """Time one call at a time of 16 tokens, each awaited, as an interactive user would."""
    tiny = lab.batch(1, 16, 16)
    trips: dict[str, dict[str, list[float]]] = {}
    for version, client in lab.clients.items():
        lab.open_run(version, "trips")
        client.ask("round_trips", run="trips", batch_=tiny, count=5)
        trips[version] = {"forward_backward": [], "optim_step": []}
    for _ in range(lab.rounds):
        for version, client in lab.clients.items():
            for call, taken in client.ask("round_trips", run="trips", batch_=tiny, count=20).items():
                trips[version][call] += taken
    rows = [
        limit_row(
            "round trip",
            f"{call} of tinker {version}, median",
            median(taken),
            at_most=25,
            unit="ms",
            note=f"p90 {quantiles(taken, n=10)[-1]:.1f} ms, fastest {min(taken):.1f} ms, {len(taken)} calls",
        )
        for version, calls in trips.items()
        for call, taken in calls.items()
    ]
    alone = lab.torch_side.ask("engine_loop", batches=[tiny], steps=20, rank=_RANK)
    return [
        *rows,
        Row(
            measurement="round trip",
            what="both calls in the engine alone",
            measured=f"{median(alone) * 1000:.1f} ms",
        ),
    ]


def pipeline(lab: Lab) -> list[Row]:
    """Submit steps ahead of their results against awaiting every call, on small batches."""
    batches = [lab.batch(4, 16, 48, seed=seed) for seed in range(8)]
    num_steps = 40
    num_tokens = num_steps * batches[0].num_tokens
    seconds: dict[str, dict[int, list[float]]] = {}
    for version, client in lab.clients.items():
        lab.open_run(version, "pipeline")
        client.ask("loop", run="pipeline", batches=batches, steps=5, ahead=_AHEAD)
        seconds[version] = {0: [], _AHEAD: []}
    for _ in range(lab.rounds):
        for version, client in lab.clients.items():
            for ahead, taken in seconds[version].items():
                taken.append(
                    client.ask("loop", run="pipeline", batches=batches, steps=num_steps, ahead=ahead)
                )
    return [
        ratio_row(
            "pipelined loop",
            f"{_AHEAD} steps ahead against one by one, tinker {version}",
            taken[0],
            taken[_AHEAD],
            at_least=1.3,
            note=f"{batches[0].num_tokens} tokens a step; {num_tokens / median(taken[_AHEAD]):.0f} tokens/s, "
            f"one by one {num_tokens / median(taken[0]):.0f}",
        )
        for version, taken in seconds.items()
    ]


def against_peft(lab: Lab) -> list[Row]:
    """Put the pipelined loop through the whole product beside a PEFT loop on padded batches in one process."""
    batches = [lab.batch(16, 32, 512, seed=seed) for seed in range(3)]
    num_steps = 6
    num_tokens = num_steps * batches[0].num_tokens
    client = lab.clients[lab.newest]
    lab.open_run(lab.newest, "against-peft")
    ours: Callable[[int], float] = lambda steps: client.ask(  # noqa: E731
        "loop", run="against-peft", batches=batches, steps=steps, ahead=_AHEAD
    )
    theirs: Callable[[int], float] = lambda steps: lab.torch_side.ask(  # noqa: E731
        "peft_loop", batches=batches, steps=steps, rank=_RANK
    )
    ours(2), theirs(2)
    pairs = [(theirs(num_steps), ours(num_steps)) for _ in range(lab.rounds)]
    peft, product = ([pair[i] for pair in pairs] for i in (0, 1))
    return [
        ratio_row(
            "pipelined loop",
            f"SDK loop against transformers + PEFT, padded, tinker {lab.newest}",
            peft,
            product,
            at_least=1.4,
            note=f"16 sequences of 32 to 512 tokens, padding ratio {batches[0].padding_ratio:.2f}; "
            f"{num_tokens / median(product):.0f} tokens/s, PEFT {num_tokens / median(peft):.0f}",
        )
    ]


def recipe(lab: Lab) -> list[Row]:
    """Put a run without code, from database to database, beside a PEFT loop on the very same batches."""
    recipes, num_steps = Recipes(lab.instance, lab.base_model), 20
    pairs: list[tuple[float, Finished]] = []
    for seed in range(lab.rounds + 1):
        run = recipes.train(num_steps, seed=seed, lora={"rank": _RANK})
        pairs.append((lab.torch_side.ask("peft_recorded", batches=run.batches, rank=_RANK), run))
    peft, runs = [pair[0] for pair in pairs[1:]], [pair[1] for pair in pairs[1:]]
    padding = median(run.padding_ratio for run in runs)
    speed = median(run.num_tokens / run.seconds for run in runs)
    busy = sum(run.busy_s for run in runs) / sum(run.seconds for run in runs)
    return [
        ratio_row(
            "recipe",
            "supervised fine-tuning without code against transformers + PEFT, padded, on the same batches",
            peft,
            [run.seconds for run in runs],
            at_least=1.0,
            note=f"{num_steps} steps of 16 rows, padding ratio {padding:.2f}; {speed:.0f} tokens/s",
        ),
        Row(
            measurement="recipe",
            what="device busy from the first optimizer step to the last",
            target=">= 95 %",
            measured=f"{100 * busy:.0f} %",
            is_met=busy >= 0.95,
        ),
    ]


def exactness(lab: Lab) -> list[Row]:
    """Compare log-probabilities with transformers', before any step and for an exported adapter in plain PEFT."""
    version, client = lab.oldest, lab.clients[lab.oldest]
    few = lab.batch(8, 16, 256)
    rows = []
    for each, one in lab.clients.items():
        lab.open_run(each, "exactness")
        difference = _difference(
            one.ask("forward", run="exactness", batch_=few), lab.torch_side.ask("logprobs", batch_=few)
        )
        rows.append(
            limit_row(
                "exactness",
                f"log-probabilities before any step against transformers, tinker {each}",
                difference,
                at_most=2e-5,
                note=f"largest of {few.num_tokens} differences",
            )
        )
    lab.open_run(version, "exported", rank=_ODD_RANK)
    before = client.ask("forward", run="exported", batch_=few)
    client.ask("loop", run="exported", batches=[few], steps=10, ahead=_AHEAD)
    after = client.ask("forward", run="exported", batch_=few)
    adapter = _stored(lab, client.ask("save", run="exported", name="exported"))
    plain = lab.torch_side.ask("logprobs", batch_=few, adapter=str(adapter))
    moved = f"rank {_ODD_RANK}; 10 steps of tinker {version} had moved them by up to {_difference(before, after):.2g}"
    exported = "log-probabilities of the exported adapter in plain PEFT against ours"
    return [*rows, limit_row("exactness", exported, _difference(after, plain), at_most=3e-5, note=moved)]


def neighbours(lab: Lab) -> list[Row]:
    """Train one run alone and again while seven others train in the same cycles; compare every byte."""
    client, num_steps = lab.clients[lab.newest], 12
    names = [f"run{i}" for i in range(8)]
    subject = [lab.batch(4, 24, 96, seed=step) for step in range(num_steps)]
    others = {
        name: [lab.batch(1 + i % 4, 8, 40 + 20 * i, seed=100 * i + step) for step in range(num_steps)]
        for i, name in enumerate(names)
    }
    train: Callable[..., str] = lambda runs, batches: client.ask(  # noqa: E731
        "train_together", runs=runs, subject=runs[0], batches=batches, weight_decay=0.1
    )
    lab.open_run(lab.newest, "alone")
    alone = train(["alone"], {"alone": subject})
    run_ids = [
        lab.open_run(lab.newest, name, rank=_RANK if i == 0 else _RANKS_OF_EIGHT[i])
        for i, name in enumerate(names)
    ]
    together = train(names, {**others, names[0]: subject})
    files = [_files(lab, client.ask("save_state", run=name, name="final")) for name in ("alone", names[0])]
    num_shared, mean_runs = _company(lab, run_ids[0])
    note = f"{num_shared} of its {num_steps} forward_backwards were committed with others, {mean_runs:.1f} runs on average"
    same = {
        "answers": alone == together,
        **{name: digest == files[1][name] for name, digest in files[0].items()},
    }
    return [
        Row(
            measurement="neighbours",
            what=f"{what} of a run: alone and with 7 others",
            target="same bytes",
            measured="same bytes" if is_same else "other bytes",
            is_met=is_same,
            note=note if what == "answers" else "12 steps, weight decay 0.1",
        )
        for what, is_same in same.items()
    ]


MEASUREMENTS: Final[dict[str, Callable[[Lab], list[Row]]]] = {
    "round-trip": round_trip,
    "pipeline": pipeline,
    "against-peft": against_peft,
    "recipe": recipe,
    "exactness": exactness,
    "neighbours": neighbours,
}


def _difference(one: list[list[float]], other: list[list[float]]) -> float:
    return max(
        abs(a - b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
    )


def _files(lab: Lab, path: str) -> dict[str, str]:
    """Return the digest of each tensor file of a saved state."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(_stored(lab, path).glob("*.safetensors"))
    }


def _stored(lab: Lab, path: str) -> Path:
    """Return where the instance's storage has a checkpoint."""
    run_id, kind, name = path.removeprefix("tinker://").split("/")
    query = """SELECT c.directory FROM runs_checkpoint c JOIN runs_trainingrun r ON r.id = c.run_id
               WHERE r.public_id = %s AND c.kind = %s AND c.name = %s"""
    (directory,) = _query(lab, query, [run_id, kind, name])
    return lab.instance.data_dir / "storage" / str(directory)


def _company(lab: Lab, run_id: str) -> tuple[int, float]:
    """Return how many of a run's forward_backwards had neighbours, and the mean number of runs with itself.

    Rows that one transaction wrote carry the same xmin, and a transaction commits one cycle.
    """
    query = """
    WITH cycle AS (SELECT xmin::text AS id, count(DISTINCT run_id) AS num_runs FROM runs_operation
                   WHERE kind = 'forward_backward' GROUP BY 1)
    SELECT count(*) FILTER (WHERE num_runs > 1), avg(num_runs)::float8
    FROM runs_operation op JOIN cycle ON cycle.id = op.xmin::text JOIN runs_trainingrun r ON r.id = op.run_id
    WHERE r.public_id = %s AND op.kind = 'forward_backward'
    """
    num_shared, mean_runs = _query(lab, query, [run_id])
    return int(str(num_shared)), float(str(mean_runs))


def _query(lab: Lab, query: str, values: list[str]) -> tuple[object, ...]:
    with psycopg.connect(embedded.database_url(lab.instance.data_dir)) as connection:
        row = connection.execute(query.encode(), values).fetchone()
    assert row is not None
    return row
