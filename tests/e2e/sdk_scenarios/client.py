"""The client of whichever SDK is installed, and the few calls that most scenarios make.

The base model comes from SCENARIO_MODEL.
"""
# mypy: ignore-errors

from __future__ import annotations

import os

try:
    import mint as sdk
except ImportError:
    import tinker as sdk

types = sdk.types
MODEL = os.environ.get("SCENARIO_MODEL", "mintweb/tiny")
TOKENS = [11, 12, 13, 14, 15, 16, 17, 18]
IS_OWN_MINT = hasattr(sdk, "Future")


def ready(client):
    """Return the client, which newer SDKs give as a future."""
    return client.result() if hasattr(client, "result") else client


def new_service():
    return sdk.ServiceClient()


def new_client(service=None, *, seed=7, rank=8):
    service = service or new_service()
    return ready(service.create_lora_training_client(base_model=MODEL, rank=rank, seed=seed))


def rest_client(service):
    return service.create_rest_client() if sdk.__name__ == "mint" else sdk.RestClient()


def make_datum(tokens, **inputs):
    """Make a datum that predicts each next token; weights are 1 unless other inputs are given."""
    targets = list(tokens[1:])
    inputs = inputs or {"weights": [1.0] * len(targets)}
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens[:-1])),
        loss_fn_inputs={"target_tokens": targets, **inputs},
    )


def logprobs_of(output, index=0):
    return [float(x) for x in output.loss_fn_outputs[index]["logprobs"].data]


def forward_logprobs(client, tokens=TOKENS):
    return logprobs_of(client.forward([make_datum(tokens)], "cross_entropy").result())


def step(client, tokens=TOKENS, learning_rate=1e-3):
    """Run one training step and return the loss sum."""
    future = client.forward_backward([make_datum(tokens)], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=learning_rate)).result()
    return future.result().metrics["loss:sum"]


def max_difference(one, two):
    return max(abs(x - y) for x, y in zip(one, two, strict=True))


def sample(sampler, prompt=TOKENS, num_samples=1, **params):
    params = types.SamplingParams(**{"max_tokens": 6, "temperature": 1.0} | params)
    reply = sampler.sample(types.ModelInput.from_ints(list(prompt)), num_samples, params).result()
    return [
        {
            "tokens": [int(t) for t in s.tokens],
            "stop_reason": str(s.stop_reason),
            "logprobs": list(s.logprobs),
        }
        for s in reply.sequences
    ]


def error_of(call):
    """Return the class and text of the error that the call ends in, None if it succeeds."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the error is the fact to report
        return {"type": type(error).__name__, "text": str(error)}
    return None
