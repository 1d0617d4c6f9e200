"""What training answers: losses, steps, errors and sums."""
# mypy: ignore-errors

from __future__ import annotations

import asyncio
import math
import time

from client import (
    MODEL,
    TOKENS,
    error_of,
    forward_logprobs,
    logprobs_of,
    make_datum,
    max_difference,
    new_client,
    new_service,
    ready,
    sdk,
    step,
    types,
)

OUT_OF_VOCABULARY = 2_000_000


def capabilities():
    if sdk.__name__ == "mint":
        answer = new_service().get_server_capabilities()
    else:
        answer = sdk.RestClient().get_server_capabilities().result()
    return {"models": [(m.model_name, m.max_context_length) for m in answer.supported_models]}


def create_lora_training_client():
    service = new_service()
    first, second = new_client(service), new_client(service, rank=4)
    return {
        "model_ids": [str(first.model_id), str(second.model_id)],
        "class": f"{type(first).__module__}.{type(first).__name__}",
        "unknown_model": error_of(
            lambda: ready(service.create_lora_training_client(base_model="no/such", rank=4))
        ),
    }


def get_info():
    info = new_client(rank=4).get_info()
    data = info.model_data
    names = {"model_name": data.model_name, "tokenizer_id": data.tokenizer_id}
    return {"model_id": str(info.model_id), "is_lora": info.is_lora, "lora_rank": info.lora_rank, **names}


def get_tokenizer():
    tokenizer = new_client().get_tokenizer()
    text = "Hello, fine-tuning world!"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    return {"num_tokens": len(tokens), "text": tokenizer.decode(tokens), "expected_text": text, "chat": chat}


def forward():
    client = new_client()
    output = client.forward([make_datum(TOKENS), make_datum(TOKENS[:4])], "cross_entropy").result()
    before = logprobs_of(output)
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return {
        "num_outputs": len(output.loss_fn_outputs),
        "lengths": [len(logprobs_of(output, i)) for i in (0, 1)],
        "loss_sum": output.metrics["loss:sum"],
        "expected_loss_sum": -sum(before) - sum(logprobs_of(output, 1)),
        "changed_by_step_without_gradient": max_difference(before, forward_logprobs(client)),
    }


def losses():
    """All five losses where the sampling policy is the current one, so that every ratio is 1."""
    client = new_client()
    p = forward_logprobs(client)
    advantages = [1.0, -0.5, 0.25, 2.0, 0.0, 1.0, -1.0]
    weighted = -sum(x * a for x, a in zip(p, advantages, strict=True))
    clip = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    cases = {
        "cross_entropy": (None, {"weights": [1.0] * 7}, -sum(p)),
        "importance_sampling": (None, {"logprobs": p, "advantages": advantages}, -sum(advantages)),
        "ppo": (clip, {"logprobs": p, "advantages": advantages}, -sum(advantages)),
        "cispo": (clip, {"logprobs": p, "advantages": advantages}, weighted),
        "dro": ({"beta": 0.05}, {"logprobs": p, "advantages": advantages}, weighted),
    }
    facts = {}
    for loss_fn, (config, inputs, expected) in cases.items():
        output = client.forward_backward([make_datum(TOKENS, **inputs)], loss_fn, config).result()
        facts[loss_fn] = {
            "loss_sum": output.metrics["loss:sum"],
            "expected": expected,
            "logprob_difference": max_difference(p, logprobs_of(output)),
        }
    return facts


def off_policy_losses():
    """The losses with ratios beside 1, as computed here from the formulas."""
    client = new_client()
    p = forward_logprobs(client)
    q = [x + d for x, d in zip(p, [0.3, -0.3, 0.1, -0.1, 0.0, 0.5, -0.5], strict=True)]
    a = [1.0, 1.0, -1.0, -1.0, 1.0, -1.0, 1.0]
    r = [math.exp(x - y) for x, y in zip(p, q, strict=True)]
    clipped = [min(max(x, 0.8), 1.2) for x in r]
    clip = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    terms = {
        "importance_sampling": (None, [x * y for x, y in zip(r, a, strict=True)]),
        "ppo": (clip, [min(x * z, y * z) for x, y, z in zip(r, clipped, a, strict=True)]),
        "cispo": (clip, [x * y * z for x, y, z in zip(clipped, p, a, strict=True)]),
        "dro": (
            {"beta": 0.05},
            [x * z - 0.025 * (x - y) ** 2 for x, y, z in zip(p, q, a, strict=True)],
        ),
    }
    facts = {}
    for loss_fn, (config, term) in terms.items():
        data = [make_datum(TOKENS, logprobs=q, advantages=a)]
        output = client.forward_backward(data, loss_fn, config).result()
        facts[loss_fn] = {"loss_sum": output.metrics["loss:sum"], "expected": -sum(term)}
    return facts


def unknown_loss():
    client = new_client()
    data = [make_datum(TOKENS)]
    return {"error": error_of(lambda: client.forward_backward(data, "no_such_loss").result())}


def optim_step():
    client = new_client()
    before = forward_logprobs(client)
    client.forward_backward([make_datum(TOKENS)], "cross_entropy").result()
    adam = types.AdamParams(learning_rate=1e-3, grad_clip_norm=1.0, weight_decay=0.01)
    response = client.optim_step(adam).result()
    return {"metrics": response.metrics, "change": max_difference(before, forward_logprobs(client))}


def loss_falls():
    """Ten steps, all submitted before the first result is awaited."""
    client = new_client()
    adam = types.AdamParams(learning_rate=2e-3)
    futures = []
    for _ in range(10):
        futures.append(client.forward_backward([make_datum(TOKENS)], "cross_entropy"))
        last_step = client.optim_step(adam)
    sums = [future.result().metrics["loss:sum"] for future in futures]
    last_step.result()
    return {"loss_sums": sums, "fell": sums[-1] < sums[0] / 2}


def accumulation():
    """Gradients of two calls add up: the same step as with one call of both datums."""
    one, two = new_client(seed=3), new_client(seed=3)
    data = [make_datum(TOKENS), make_datum(TOKENS[::-1])]
    one.forward_backward(data, "cross_entropy")
    for datum in data:
        two.forward_backward([datum], "cross_entropy")
    for client in (one, two):
        client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    return {"difference": max_difference(forward_logprobs(one), forward_logprobs(two))}


def custom_loss():
    """A custom loss that is cross-entropy, beside the server's: the same step."""
    own, builtin = new_client(seed=3), new_client(seed=3)

    def loss_fn(data, logprobs):
        return -sum(p.sum() for p in logprobs), {"num_datums": float(len(data))}

    output = own.forward_backward_custom([make_datum(TOKENS)], loss_fn).result()
    reference = builtin.forward_backward([make_datum(TOKENS)], "cross_entropy").result()
    for client in (own, builtin):
        client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    return {
        "metrics": output.metrics,
        "reference_loss_sum": reference.metrics["loss:sum"],
        "difference": max_difference(forward_logprobs(own), forward_logprobs(builtin)),
    }


def chunked_batch():
    client = new_client()
    data = [make_datum([i % 50 + 1, i % 40 + 2, i % 30 + 3]) for i in range(2500)]
    started_at = time.monotonic()
    future = client.forward_backward(data, "cross_entropy")
    optim_future = client.optim_step(types.AdamParams(learning_rate=1e-3))
    output = future.result()
    optim_future.result()
    duration_s = time.monotonic() - started_at
    rows = [logprobs_of(output, i) for i in range(len(output.loss_fn_outputs))]
    expected = [
        logprobs_of(new_client().forward([data[i]], "cross_entropy").result()) for i in (0, 1500, 2499)
    ]
    return {
        "num_outputs": len(rows),
        "loss_sum": output.metrics["loss:sum"],
        "expected_loss_sum": -sum(map(sum, rows)),
        "order_difference": max(
            max_difference(rows[i], row) for i, row in zip((0, 1500, 2499), expected, strict=True)
        ),
        "duration_s": duration_s,
    }


def failed_future():
    client = new_client()
    bad = make_datum([1, OUT_OF_VOCABULARY, 3])
    futures = [
        client.forward_backward([d], "cross_entropy") for d in (make_datum(TOKENS), bad, make_datum(TOKENS))
    ]
    optim_future = client.optim_step(types.AdamParams(learning_rate=1e-3))
    error = error_of(futures[1].result)
    return {
        "error": error,
        "others": [futures[i].result().metrics["loss:sum"] for i in (0, 2)],
        "step": optim_future.result().metrics,
        "still_works": step(client),
        "is_the_failed_one_repeatable": error_of(futures[1].result) == error,
    }


def out_of_vocabulary():
    client = new_client()
    prompt = types.ModelInput.from_ints([1, OUT_OF_VOCABULARY])
    sampler = ready(client.save_weights_and_get_sampling_client())
    params = types.SamplingParams(max_tokens=2)
    negative = make_datum([1, -5, 3])
    return {
        "target": error_of(lambda: step(client, [1, 2, OUT_OF_VOCABULARY])),
        "input": error_of(lambda: step(client, [1, OUT_OF_VOCABULARY, 2])),
        "negative": error_of(lambda: client.forward([negative], "cross_entropy").result()),
        "prompt": error_of(lambda: sampler.sample(prompt, 1, params).result()),
    }


def unserved_operation():
    """One that only newer clients know; they count it and go on with the next number."""
    client = new_client()
    before = step(client)
    if not hasattr(client, "save_weights_external"):
        return {"is_known": False}
    error = error_of(lambda: client.save_weights_external("outside").result())
    started_at = time.monotonic()
    after = step(client)
    return {
        "is_known": True,
        "error": error,
        "fell": after < before,
        "duration_s": time.monotonic() - started_at,
    }


def double_await():
    """The style that tinker 0.22 documents, with this project's mint too."""

    async def run():
        service = new_service()
        client = await service.create_lora_training_client_async(base_model=MODEL, rank=8, seed=7)
        future = await client.forward_backward_async([make_datum(TOKENS)], "cross_entropy")
        optim_future = await client.optim_step_async(types.AdamParams(learning_rate=1e-3))
        result = await future.result_async()
        await optim_future.result_async()
        sampler = await client.save_weights_and_get_sampling_client_async()
        reply = await sampler.sample_async(
            types.ModelInput.from_ints(TOKENS), 2, types.SamplingParams(max_tokens=3)
        )
        return {"loss_sum": result.metrics["loss:sum"], "num_sequences": len(reply.sequences)}

    return asyncio.run(run())


SCENARIOS = (
    capabilities,
    create_lora_training_client,
    get_info,
    get_tokenizer,
    forward,
    losses,
    off_policy_losses,
    unknown_loss,
    optim_step,
    loss_falls,
    accumulation,
    custom_loss,
    chunked_batch,
    failed_future,
    out_of_vocabulary,
    unserved_operation,
    double_await,
)
