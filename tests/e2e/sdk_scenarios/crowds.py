"""Much at once: queued batches, concurrent runs, and the loop of MinT's guide."""
# mypy: ignore-errors

from __future__ import annotations

import asyncio
import time

from client import (
    IS_OWN_MINT,
    MODEL,
    TOKENS,
    make_datum,
    max_difference,
    new_client,
    new_service,
    step,
    types,
)

OUT_OF_VOCABULARY = 2_000_000


def hundred_batches():
    """A hundred batches and their steps, all queued before the first result is read."""
    client = new_client()
    adam = types.AdamParams(learning_rate=1e-3)
    started_at = time.monotonic()
    futures = []
    for _ in range(100):
        futures.append(client.forward_backward([make_datum(TOKENS)] * 4, "cross_entropy"))
        futures.append(client.optim_step(adam))
    submitted_s = time.monotonic() - started_at
    results = [future.result() for future in futures]
    sums = [result.metrics["loss:sum"] for result in results[::2]]
    return {
        "num_results": len(results),
        "first": sums[0],
        "last": sums[-1],
        "fell": sums[-1] < sums[0],
        "submitted_s": submitted_s,
        "duration_s": time.monotonic() - started_at,
    }


def concurrent_runs():
    """Two runs that train at the same time come out as one that trains alone."""
    service = new_service()
    clients = [new_client(service, seed=3), new_client(service, seed=4)]
    alone = new_client(service, seed=3)
    adam = types.AdamParams(learning_rate=1e-3)
    futures = [[], []]
    for _ in range(5):
        for client, own in zip(clients, futures, strict=True):
            own.append(client.forward_backward([make_datum(TOKENS)], "cross_entropy"))
            client.optim_step(adam)
    together = [future.result().metrics["loss:sum"] for future in futures[0]]
    for future in futures[1]:
        future.result()
    return {"loss_sums": together, "difference": max_difference(together, [step(alone) for _ in range(5)])}


def guide_style():
    """The style of MinT's guide: only this project's mint has it."""
    if not IS_OWN_MINT:
        return {"skipped": "needs this project's mint"}

    async def run():
        service = new_service()
        client = await service.create_lora_training_client_async(base_model=MODEL, rank=8, seed=7)
        data = [make_datum(TOKENS), make_datum([1, OUT_OF_VOCABULARY, 3]), make_datum(TOKENS)]
        futures = [client.forward_backward_async([datum], loss_fn="cross_entropy") for datum in data]
        optim_future = client.optim_step_async(types.AdamParams(learning_rate=1e-3))
        try:
            await asyncio.gather(*[future.result_async() for future in futures])
            error = None
        except Exception as caught:  # noqa: BLE001 - the caller judges what it is
            error = str(caught)
        good = [await futures[0].result_async(), await futures[2]]
        await optim_future.result_async()
        return {
            "error": error,
            "losses": [result.loss for result in good],
            "metrics": good[0].metrics,
        }

    return asyncio.run(run())


SCENARIOS = (hundred_batches, concurrent_runs, guide_style)
