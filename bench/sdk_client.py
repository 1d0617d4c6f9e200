"""The unmodified SDK of a client environment: `python -m bench.sdk_client`, driven by `bench.companion`.

Imports tinker and nothing of mintweb. Futures and clients differ a little between SDK versions.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import tinker
from tinker import types

from bench.batches import batch
from bench.companion import serve

_runs: dict[str, Any] = {}
_service: list[Any] = []


def open_run(name: str, base_model: str, rank: int, seed: int) -> str:
    """Create a run and return its id."""
    client = _ready(service().create_lora_training_client(base_model=base_model, rank=rank, seed=seed))
    _runs[name] = client
    return str(client.get_info().model_id)


def service() -> Any:
    """Return the one service client of this process."""
    if not _service:
        _service.append(tinker.ServiceClient())
    return _service[0]


def round_trips(run: str, batch_: dict[str, int], count: int) -> dict[str, list[float]]:
    """Return the milliseconds of each forward_backward and each optim_step, one after another."""
    data, client = _data(batch_), _runs[run]
    taken: dict[str, list[float]] = {"forward_backward": [], "optim_step": []}
    for _ in range(count):
        begin = time.perf_counter()
        client.forward_backward(data, "cross_entropy").result()
        middle = time.perf_counter()
        client.optim_step(_adam()).result()
        end = time.perf_counter()
        taken["forward_backward"].append((middle - begin) * 1000)
        taken["optim_step"].append((end - middle) * 1000)
    return taken


def loop(run: str, batches: Sequence[dict[str, int]], steps: int, ahead: int) -> float:
    """Return the seconds of a training loop that lets `ahead` steps be on their way; 0 awaits every call."""
    data = [_data(one) for one in batches]
    client, waiting = _runs[run], deque[Any]()
    begin = time.perf_counter()
    for step in range(steps):
        futures = [client.forward_backward(data[step % len(data)], "cross_entropy")]
        if ahead == 0:
            futures.pop().result()
        futures.append(client.optim_step(_adam()))
        waiting.append(futures)
        while len(waiting) > ahead:
            for future in waiting.popleft():
                future.result()
    for futures in waiting:
        for future in futures:
            future.result()
    return time.perf_counter() - begin


def train_together(
    runs: Sequence[str], subject: str, batches: dict[str, Sequence[dict[str, int]]], weight_decay: float
) -> str:
    """Train the runs side by side, everything submitted ahead; return the digest of the subject's answers."""
    data = {run: [_data(one) for one in batches[run]] for run in runs}
    answers = []
    for step in range(len(data[subject])):
        for run in runs:
            future = _runs[run].forward_backward(data[run][step], "cross_entropy")
            last = _runs[run].optim_step(_adam(weight_decay))
            if run == subject:
                answers.append(future)
    digest = hashlib.sha256()
    for future in answers:
        for logprobs in _logprobs(future.result()):
            digest.update(logprobs.tobytes())
    last.result()
    return digest.hexdigest()


def forward(run: str, batch_: dict[str, int]) -> list[list[float]]:
    """Return the log-probabilities of the targets of each sequence."""
    result = _runs[run].forward(_data(batch_), "cross_entropy").result()
    return [values.tolist() for values in _logprobs(result)]


def save(run: str, name: str) -> str:
    """Save weights for sampling under a name and return their path."""
    return str(_runs[run].save_weights_for_sampler(name).result().path)


def save_state(run: str, name: str) -> str:
    """Save weights and optimizer state under a name and return their path."""
    return str(_runs[run].save_state(name).result().path)


def version() -> str:
    """Return the SDK's version."""
    return str(tinker.__version__)


def _data(description: dict[str, int]) -> list[Any]:
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )
        for tokens in batch(description).sequences()
    ]


def _adam(weight_decay: float = 0.0) -> Any:
    return types.AdamParams(learning_rate=1e-4, weight_decay=weight_decay)


def _logprobs(result: Any) -> list[Any]:
    return [output["logprobs"].to_numpy() for output in result.loss_fn_outputs]


def _ready(client: Any) -> Any:
    """Newer SDKs return a future of a client, older ones the client itself."""
    return client.result() if hasattr(client, "result") else client


if __name__ == "__main__":
    serve(
        {
            one.__name__: one
            for one in (
                *(open_run, round_trips, loop, train_together),
                *(forward, save, save_state, version),
            )
        }
    )
