"""A training loop of an unmodified client that says when it is half way; prints its loss sums in full."""
# mypy: ignore-errors

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import mint
from mint import types

STEPS = 24
TOKENS = list(range(20, 60))


def main():
    client = mint.ServiceClient().create_lora_training_client(base_model="mintweb/tiny", rank=8, seed=3)
    inputs = {"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)}
    datum = types.Datum(model_input=types.ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs=inputs)
    futures = []
    for _ in range(STEPS):
        futures.append(client.forward_backward([datum], "cross_entropy"))
        client.optim_step(types.AdamParams(learning_rate=1e-3))
    losses = []
    for index, future in enumerate(futures):
        losses.append(future.result().metrics["loss:sum"])
        if index == STEPS // 3 and "SIGNAL_FILE" in os.environ:
            Path(os.environ["SIGNAL_FILE"]).touch()
    sys.stdout.write(json.dumps(losses))


if __name__ == "__main__":
    main()
