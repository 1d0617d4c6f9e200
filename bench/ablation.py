"""What each part of the engine is worth: the same work as it is and with that part taken out, in turn, in one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final
from unittest.mock import patch

import torch

from bench import plainly
from bench.candidates.data import engine_data
from bench.loaded import RANKS, Bench
from bench.table import Row
from gpuworker.engine import attention, batching, logprobs, lora, memory, optimizer, passes, products

_NUM_NEW: Final = 32
_CPU: Final = ("cpu float32", "cpu bfloat16")
_CPU_DEVICE: Final = torch.device("cpu")
_KEPT_BY_DEFAULT: Final = 32 << 20
"""The largest part that glibc then takes from its heap and not from the system; mallopt(3)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is timed, and how many tokens it takes."""

    what: str
    run: Callable[[], object]
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the engine, `without` which the same comes out in another way.

    `kinds` names the devices and dtypes on which it does anything.
    """

    name: str
    work: Callable[[Bench], Work]
    without: Callable[[Bench], AbstractContextManager[object]]
    kinds: Sequence[str] = ("cpu float32", "cpu bfloat16", "cuda bfloat16")


def ablation(bench: Bench) -> Iterator[Row]:
    """Take out one part at a time; on a GPU passes are launched kernel by kernel meanwhile."""
    kind = f"{bench.device.type} {bench.model.dtype}"
    parts = [part for part in PARTS if kind in part.kinds]
    works: dict[Callable[[Bench], Work], Work] = {}
    for part, until in bench.paced(parts):
        work = works.setdefault(part.work, part.work(bench))

        def time_without(part: Part = part, work: Work = work) -> float:
            with _unrecorded(bench), part.without(bench):
                work.run()
            return 0.0

        def time_with(work: Work = work) -> float:
            with _unrecorded(bench):
                work.run()
            return 0.0

        taken = bench.alternate({"without": time_without, "with": time_with}, until)
        what = f"{part.name}, against the engine without it: {work.what}"
        yield bench.ratio(what, taken, "without", "with", num_tokens=work.num_tokens)


def _unrecorded(bench: Bench) -> AbstractContextManager[object]:
    return patch.object(bench.engine.engine._trainer, "_graphs", None)


# -- what is timed -------------------------------------------------------------------------------------


def _one_run(bench: Bench) -> Work:
    mixed = bench.mixed_lengths()
    data = [engine_data(mixed.sequences())]
    return Work(
        what="one run of mixed lengths", run=lambda: bench.engine.step(data), num_tokens=mixed.num_tokens
    )


def _with_prompts(bench: Bench) -> Work:
    """One run whose sequences have no loss in their first half."""
    mixed = bench.mixed_lengths()
    data = [engine_data(mixed.sequences(), prompt_share=0.5)]
    return Work(
        what="one run, half of each sequence a prompt",
        run=lambda: bench.engine.step(data),
        num_tokens=mixed.num_tokens,
    )


def _eight_runs(bench: Bench) -> Work:
    batches = [bench.batch(4, 8, 22, seed=seed) for seed in range(len(RANKS))]
    data = [engine_data(one.sequences()) for one in batches]
    return Work(
        what="8 runs of 60 tokens",
        run=lambda: bench.engine.step(data),
        num_tokens=sum(one.num_tokens for one in batches),
    )


def _optimizer_steps(bench: Bench) -> Work:
    """The optimizer steps of eight runs alone, on gradients that are there already."""
    generator = torch.Generator(bench.device).manual_seed(0)
    adapters = bench.engine.adapters()
    gradients = [
        torch.randn(one.master_P.shape, generator=generator, device=bench.device) * 1e-3 for one in adapters
    ]

    def run() -> None:
        for _ in range(20):
            for adapter, gradient_P in zip(adapters, gradients, strict=True):
                adapter.gradient_P = gradient_P
            bench.engine.optim_step()

    return Work(what="20 optimizer steps of 8 runs", run=run, num_tokens=20 * len(RANKS))


def _one_sequence(bench: Bench) -> Work:
    prompt = bench.batch(1, 24, 24).sequences()[0][:-1]
    return Work(
        what="sampling one sequence",
        run=lambda: bench.engine.sample([(0, prompt)], _NUM_NEW),
        num_tokens=_NUM_NEW,
    )


def _eight_sequences(bench: Bench) -> Work:
    prompts = [one[:-1] for one in bench.batch(8, 24, 64).sequences()]
    mixed = [(number % 4, prompt) for number, prompt in enumerate(prompts)]
    return Work(
        what="sampling 8 sequences with 4 adapters",
        run=lambda: bench.engine.sample(mixed, _NUM_NEW),
        num_tokens=8 * _NUM_NEW,
    )


# -- how to do without ---------------------------------------------------------------------------------


def _one_by_one(bench: Bench) -> AbstractContextManager[object]:
    engine = bench.engine.engine
    together = engine.forward_backward
    return patch.object(engine, "forward_backward", lambda jobs: [together([job])[0] for job in jobs])


def _no_groups(bench: Bench) -> AbstractContextManager[object]:
    stack = ExitStack()
    for layer in bench.engine.routed_layers():
        stack.enter_context(patch.object(layer, "group", (layer,)))
    return stack


def _unpacked(bench: Bench) -> AbstractContextManager[object]:
    stack = ExitStack()
    for weight in (bench.engine.engine._head.weight, *(one.frozen for one in bench.engine.routed_layers())):
        stack.enter_context(patch.object(weight, "_forward", weight.plain))
        stack.enter_context(patch.object(weight, "_backward", weight.plain.t()))
    return stack


def _torchs_products(bench: Bench) -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.enter_context(_unpacked(bench))
    stack.enter_context(patch.object(products, "_HAS_ONEDNN", False))
    return stack


def _every_row_backward(bench: Bench) -> AbstractContextManager[object]:
    return patch.object(logprobs.Head, "score", plainly.score_every_row(logprobs.Head.score))


def _whole_head(bench: Bench) -> AbstractContextManager[object]:
    return patch.object(bench.engine.engine._head, "chunk_rows", 1 << 20)


def _transformers_rotation(bench: Bench) -> AbstractContextManager[object]:
    stack = ExitStack()
    for module in bench.engine.engine._base._decoder.modules():
        if hasattr(module, "q_proj"):
            plain = type(module).forward.__get__(module)  # type: ignore[attr-defined]
            stack.enter_context(patch.object(module, "forward", plain))
    return stack


def _no_padding(bench: Bench) -> AbstractContextManager[object]:
    stack = ExitStack()
    for module in (batching, logprobs):
        stack.enter_context(patch.object(module, "padded_size", lambda num_rows: num_rows))
    return stack


def _sixteen_rows(bench: Bench) -> AbstractContextManager[object]:
    return patch.object(bench.engine.engine.sampler.weights, "row_step", batching.MIN_BATCH_ROWS)


@contextmanager
def _returning_memory(_: Bench) -> Iterator[None]:
    """Have glibc keep what it keeps by default once large tensors were freed."""
    with patch.object(memory, "_KEPT_BYTES", _KEPT_BY_DEFAULT):
        memory.keep_freed(_CPU_DEVICE)
    yield
    memory.keep_freed(_CPU_DEVICE)


PARTS: Final = (
    Part(name="runs packed together", work=_eight_runs, without=_one_by_one),
    Part(
        name="LoRA as one step of autograd with gradients in place",
        work=_one_run,
        without=lambda _: patch.object(lora, "_group_product", plainly.group_product),
    ),
    Part(
        name="LoRA as one step of autograd with gradients in place",
        work=_eight_runs,
        without=lambda _: patch.object(lora, "_group_product", plainly.group_product),
        kinds=_CPU,
    ),
    Part(name="projection groups", work=_one_run, without=_no_groups),
    Part(
        name="oneDNN's products",
        work=_one_run,
        without=_torchs_products,
        kinds=("cpu float32",),
    ),
    Part(
        name="oneDNN's products with factors of adapters",
        work=_one_run,
        without=lambda _: patch.object(products, "_MANY_ROWS", 1 << 20),
        kinds=("cpu float32",),
    ),
    Part(
        name="no backward in the head for rows without a loss",
        work=_with_prompts,
        without=_every_row_backward,
    ),
    Part(name="the head by chunks", work=_one_run, without=_whole_head),
    Part(
        name="attention by blocks",
        work=_one_run,
        without=lambda _: patch.object(attention, "_SHORT_ROWS", 1 << 20),
        kinds=_CPU,
    ),
    Part(name="weights in the products' own layout", work=_one_run, without=_unpacked, kinds=_CPU),
    Part(name="weights in the products' own layout", work=_eight_sequences, without=_unpacked, kinds=_CPU),
    Part(name="padding to 16 rows and multiples of 8", work=_eight_runs, without=_no_padding),
    Part(
        name="one optimizer call for all runs",
        work=_optimizer_steps,
        without=lambda _: patch.object(optimizer, "_groups", lambda updates: [[one] for one in updates]),
    ),
    Part(
        name="AdamW on flat buffers",
        work=_optimizer_steps,
        without=lambda _: patch.object(optimizer, "_apply", plainly.apply_by_factor),
    ),
    Part(
        name="decoding padded to as few rows as bits allow, not to 16",
        work=_one_sequence,
        without=_sixteen_rows,
        kinds=_CPU,
    ),
    Part(
        name="adapters side by side while decoding",
        work=_eight_sequences,
        without=lambda bench: patch.object(bench.engine.engine.sampler.weights, "stacks", None),
        kinds=_CPU,
    ),
    Part(
        name="freed memory kept for the next tensors",
        work=_one_run,
        without=_returning_memory,
        kinds=_CPU,
    ),
    Part(
        name="varlen attention",
        work=_one_run,
        without=lambda _: patch.object(passes, "PackedAttention", plainly.AttentionOneByOne),
        kinds=("cuda bfloat16",),
    ),
    Part(
        name="rotary embedding in three kernels",
        work=_one_run,
        without=_transformers_rotation,
    ),
    Part(
        name="grouped products of adapters",
        work=_eight_runs,
        without=lambda _: patch.object(passes, "combine", lambda rows: [one.segment for one in rows]),
        kinds=("cuda bfloat16",),
    ),
    Part(
        name="norms in one step",
        work=_one_run,
        without=lambda _: patch.object(plainly.FusedNorm, "forward", plainly.norm),
    ),
    Part(
        name="recorded decode steps",
        work=_one_sequence,
        without=lambda bench: patch.object(bench.engine.engine.sampler, "_graphs", None),
        kinds=("cuda bfloat16",),
    ),
)
