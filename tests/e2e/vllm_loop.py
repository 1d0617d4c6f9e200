"""An unmodified client that trains a little, then samples as it reads on its input, and prints what came of it."""
# mypy: ignore-errors

from __future__ import annotations

import json
import sys

import mint
from mint import types

PROMPT = types.ModelInput.from_ints([410, 263, 611, 11, 266, 309, 278, 265])
TOKENS = list(range(20, 40))


def trained():
    """Return a client that samples from weights that are new."""
    client = mint.ServiceClient().create_lora_training_client(base_model="mintweb/tiny", rank=8, seed=3)
    inputs = {"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)}
    datum = types.Datum(model_input=types.ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs=inputs)
    for _ in range(3):
        client.forward_backward([datum], "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return client.save_weights_and_get_sampling_client(name="new")


def greedy(client):
    params = types.SamplingParams(max_tokens=24, temperature=0.0, stop=[])
    sequence = client.sample(PROMPT, num_samples=1, sampling_params=params).result().sequences[0]
    scores = client.compute_logprobs(PROMPT).result()
    return {"tokens": list(sequence.tokens), "logprobs": list(sequence.logprobs), "scores": scores[1:]}


def many(client):
    """Have long samples drawn at once."""
    params = types.SamplingParams(max_tokens=1200, temperature=1.0, seed=1, stop=[])
    futures = [client.sample(PROMPT, num_samples=2, sampling_params=params) for _ in range(4)]
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    return {"lengths": [len(one.tokens) for future in futures for one in future.result().sequences]}


def main():
    client = trained()
    for line in sys.stdin:
        answer = greedy(client) if line.strip() == "greedy" else many(client)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
