"""How soon new weights are sampled from: an optimizer step to the first token, while other sequences decode."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Final

from bench.candidates.data import engine_data
from bench.loaded import Bench
from bench.table import Row, range_row
from bench.timing import timed

_NUM_RUNS: Final = 4
_NUM_SEQUENCES: Final = 8
_STEPS_A_ROUND: Final = 6
_PROMPT_TOKENS: Final = 32


def new_weights(bench: Bench) -> Iterator[Row]:
    """Put an optimizer step, the keeping of its weights and a prompt's first token beside one decode step.

    The token comes from the step that all running sequences take, too; forward and backward are not timed.
    """
    prompts = [one[:-1] for one in bench.batch(_NUM_SEQUENCES, 24, 64).sequences()]
    fresh = bench.batch(1, _PROMPT_TOKENS, _PROMPT_TOKENS, seed=1).sequences()[0][:-1]
    data = [engine_data(bench.batch(4, 8, 22).sequences())]
    num_rounds = bench.plan.rounds + 1
    owners = [number % _NUM_RUNS for number in range(_NUM_SEQUENCES)]
    engine, seconds = bench.engine, dict[str, list[float]](renew=[], decode=[])
    engine.begin(list(zip(owners, prompts, strict=True)), 2 + num_rounds * (_STEPS_A_ROUND + 1))
    engine.decode()
    for number in range(num_rounds):
        decode = [timed(engine.decode, bench.device) for _ in range(_STEPS_A_ROUND)]
        engine.gradient(data)
        renew = timed(lambda: engine.renew(0, fresh), bench.device)
        if number:  # the first round warms up
            seconds["decode"].append(median(decode))
            seconds["renew"].append(renew)
    engine.cancel()
    is_bound = bench.device.type == "cpu"
    yield range_row(
        bench.measurement,
        "optimizer step to the first token of the new weights, over one decode step",
        [one / other for one, other in zip(seconds["renew"], seconds["decode"], strict=True)],
        at_most=3.0 if is_bound else None,
        unit="x",
        note=f"prompt of {_PROMPT_TOKENS} tokens, beside {_NUM_SEQUENCES} running sequences with "
        f"{_NUM_RUNS} adapters; {1000 * median(seconds['renew']):.0f} ms, "
        f"a decode step {1000 * median(seconds['decode']):.0f} ms",
        seconds=seconds,
    )
