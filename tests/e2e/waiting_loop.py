"""A training loop of an unmodified client with its warnings shown; says when it trains, ends when it is told to.

It prints the run's id once it trains and goes on until the file in STOP_FILE is there.
"""
# mypy: ignore-errors

import logging
import os
import sys
from pathlib import Path

import tinker
from tinker import types
from tinker.lib import queue_state_logger

TOKENS = list(range(1, 20))
# Version 0.38 tells of a pause only once it has lasted for this long, which is 15 minutes.
queue_state_logger.PAUSE_GRACE_PERIOD = 0


def main():
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    service = tinker.ServiceClient()
    client = service.create_lora_training_client("mintweb/tiny", rank=4, seed=1)
    weights = [1.0] * (len(TOKENS) - 1)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={"target_tokens": TOKENS[1:], "weights": weights},
    )
    losses = []
    while not Path(os.environ["STOP_FILE"]).exists():
        training = client.forward_backward([datum], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        losses.append(training.result().metrics["loss:sum"])
        if len(losses) == 3:
            sys.stdout.write(f"{client.get_info().model_id}\n")
            sys.stdout.flush()
    sys.exit(0 if losses[-1] < losses[0] else "the loss did not fall")


main()
