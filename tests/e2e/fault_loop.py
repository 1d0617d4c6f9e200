"""A training loop of an unmodified client that samples beside it; prints all it was answered, in full.

Given a folder in STOPS_DIR it says at the steps listed in STOPS that it is there (`at-8`), with operations under way,
and goes on once the file `go-8` is there. The longest time without an answer goes to `stall` in that folder.
"""
# mypy: ignore-errors

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import mint
from mint import types

STEPS = 24
AHEAD = 6
TOKENS = list(range(20, 60))
STOPS_DIR = os.environ.get("STOPS_DIR")
STOPS = [int(step) for step in os.environ.get("STOPS", "").split(",") if step]


class Answers:
    """What was asked for and what came, oldest first."""

    def __init__(self):
        self.losses, self.tokens = [], []
        self.longest_s = 0.0
        self._pending = []
        self._last_at = time.monotonic()

    def expect(self, training, sampling):
        self._pending.append((training, sampling))
        if len(self._pending) > AHEAD:
            self.take()

    def take(self):
        training, sampling = self._pending.pop(0)
        self.losses.append(training.result().metrics["loss:sum"])
        self.tokens.append([int(token) for token in sampling.result().sequences[0].tokens])
        now = time.monotonic()
        self.longest_s, self._last_at = max(self.longest_s, now - self._last_at), now

    def take_all(self):
        while self._pending:
            self.take()


def main():
    client = mint.ServiceClient().create_lora_training_client(base_model="mintweb/tiny", rank=8, seed=3)
    inputs = {"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)}
    datum = types.Datum(model_input=types.ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs=inputs)
    client.forward_backward([datum], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-2))
    sampler = client.save_weights_and_get_sampling_client()
    prompt = types.ModelInput.from_ints(TOKENS[:4])
    answers = Answers()
    for step in range(STEPS):
        training = client.forward_backward([datum], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-3))
        params = types.SamplingParams(max_tokens=12, temperature=1.0, seed=step)
        answers.expect(training, sampler.sample(prompt, 1, params))
        if step in STOPS:
            stop_at(step)
    answers.take_all()
    path = client.save_state("final").result().path
    if STOPS_DIR:
        Path(STOPS_DIR, "stall").write_text(str(answers.longest_s))
    sys.stdout.write(json.dumps({"losses": answers.losses, "tokens": answers.tokens, "path": path}))


def stop_at(step):
    Path(STOPS_DIR, f"at-{step}").touch()
    deadline = time.monotonic() + 300
    while not Path(STOPS_DIR, f"go-{step}").exists():
        if time.monotonic() > deadline:
            sys.exit(f"nobody said go at step {step}")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
