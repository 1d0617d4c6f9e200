"""The dtype of the frozen weights on a CPU when nobody names one: tried out with the model itself.

Adapters, their moments, losses and log-probabilities are float32 either way. Called by base_model at load.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from gpuworker.engine.products import frozen_linear
from gpuworker.engine.types import Int64Array

MIN_SPEEDUP: Final = 1.5
MAX_ERROR: Final = 0.05
"""Mean difference of log-probabilities, over the whole vocabulary, that bfloat16 weights may make."""
_MIN_WIDTH: Final = 512  # below it products are a minor part of a step, which then gains nothing
_NUM_ROWS: Final = 256
_NUM_ROUNDS: Final = 5


def read_fitting(read: Callable[[torch.dtype], nn.Module]) -> tuple[nn.Module, str]:
    """Return the model in bfloat16 where that is faster here and exact enough, else in float32; and the reason.

    Args:
        read: returns the model in a dtype, on the CPU; called up to three times.
    """
    model = read(torch.float32)
    widest = max((m.weight for m in model.modules() if isinstance(m, nn.Linear)), key=lambda w: min(w.shape))
    if not has_bfloat16_products():
        return model, "float32: the processor has no bfloat16 products"
    if min(widest.shape) < _MIN_WIDTH:
        return model, f"float32: the model is narrower than {_MIN_WIDTH}, which bfloat16 would not speed up"
    speedup = measure_speedup(widest)
    if speedup < MIN_SPEEDUP:
        return model, f"float32: bfloat16 products are {speedup:.1f} times as fast here, not {MIN_SPEEDUP}"
    expected = plain_logprobs(model)
    del model, widest  # the two models need not fit beside each other
    model = read(torch.bfloat16)
    error = (plain_logprobs(model) - expected).abs().mean().item()
    if not error <= MAX_ERROR:
        del model
        reason = f"float32: bfloat16 changes log-probabilities by {error:.2g} on average, above {MAX_ERROR}"
        return read(torch.float32), reason
    return model, (
        f"bfloat16: products are {speedup:.1f} times as fast as in float32 here, and log-probabilities "
        f"change by {error:.2g} on average"
    )


def plain_logprobs(model: nn.Module) -> Tensor:
    """Return the log-probabilities of all tokens, float32, (rows, V), by the untouched model on `probe_sequences`."""
    weight = model.get_output_embeddings().weight  # type: ignore[operator]
    sequences = probe_sequences(int(weight.shape[0]))
    with torch.no_grad():
        logits = [model(torch.from_numpy(s).to(weight.device)[None]).logits[0] for s in sequences]
    return torch.cat(logits).float().log_softmax(-1)


def probe_sequences(vocab_size: int) -> list[Int64Array]:
    """Return two short sequences of random tokens, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (n,), generator=generator).numpy() for n in (7, 12)]


@torch.no_grad()
def measure_speedup(weight_FD: Tensor) -> float:
    """Return how many times as fast as in float32 a product with this weight is in bfloat16.

    The least processor time of a few alternating rounds on one thread: on a busy machine, threads that wait
    for each other have shown anything from 0.9 to 25 times instead of 2.2.
    """
    operands = {
        dtype: (torch.ones(_NUM_ROWS, weight_FD.shape[1], dtype=dtype), weight_FD.to(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(operands, float("inf"))
    with _one_thread():
        for _ in range(_NUM_ROUNDS):
            for dtype, (rows_TD, weight) in operands.items():
                started_at = time.thread_time()
                frozen_linear(rows_TD, weight)
                best[dtype] = min(best[dtype], time.thread_time() - started_at)
    return best[torch.float32] / best[torch.bfloat16]


@contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def has_bfloat16_products() -> bool:
    """Return whether the processor multiplies bfloat16 itself; without, such a product takes several times as long."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
