"""An unmodified client that does what it reads, a line at a time, and prints what came of it."""
# mypy: ignore-errors

from __future__ import annotations

import sys

import mint
from mint import types

SMALL = list(range(20, 40))
ADAM = types.AdamParams(learning_rate=1e-3)


def step(client, num_data):
    """Train one step; 180 examples of 100 tokens are far more than a row holds."""
    tokens = SMALL if num_data == 1 else SMALL * 5
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    future = client.forward_backward([datum] * num_data, "cross_entropy")
    client.optim_step(ADAM).result()
    return repr(future.result().metrics["loss:sum"])


def act(client, order, argument):
    if order == "save":
        client.save_state(argument).result()
        return "saved"
    if order == "load":
        client.load_state(f"tinker://{client.model_id}/weights/{argument}").result()
        return "loaded"
    return step(client, 180 if order == "large" else 1)


def main():
    client = mint.ServiceClient().create_lora_training_client(base_model="mintweb/tiny", rank=8, seed=3)
    for line in sys.stdin:
        order, _, argument = line.strip().partition(" ")
        try:
            answer = act(client, order, argument)
        except Exception as error:  # noqa: BLE001 - what a user would see
            answer = f"failed {type(error).__name__} {getattr(error, 'category', '')} {error}"
        sys.stdout.write(answer.replace("\n", " ") + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
