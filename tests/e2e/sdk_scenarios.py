"""What a client does with a live server, run inside a client environment.

    sdk_scenarios.py NAME [NAME ...]     or     sdk_scenarios.py all     or     sdk_scenarios.py list

Every scenario prints one JSON line of facts; what they should be is for the caller to judge. One that
raises prints its traceback as "failed", and the exit status is 1. The
server and the key come from MINT_BASE_URL, MINT_API_KEY, TINKER_BASE_URL and TINKER_API_KEY, the base
model from SCENARIO_MODEL. Runs with the published mint, this project's mint and tinker 0.38.
"""
# mypy: ignore-errors

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import time
import traceback

try:
    import mint as sdk
except ImportError:
    import tinker as sdk

types = sdk.types
MODEL = os.environ.get("SCENARIO_MODEL", "mintweb/tiny")
TOKENS = [11, 12, 13, 14, 15, 16, 17, 18]
OUT_OF_VOCABULARY = 2_000_000
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


def save_and_load():
    client = new_client()
    step(client)
    saved = forward_logprobs(client)
    path = client.save_state("s1").result().path
    onward = [step(client), step(client), step(client)]
    later = forward_logprobs(client)
    client.load_state(path).result()
    without_optimizer = forward_logprobs(client)
    fresh = [step(client), step(client), step(client)]
    client.load_state_with_optimizer(path).result()
    with_optimizer = forward_logprobs(client)
    resumed = [step(client), step(client), step(client)]
    return {
        "path": path,
        "moved_on": max_difference(saved, later),
        "weights_difference": max_difference(saved, without_optimizer),
        "weights_difference_with_optimizer": max_difference(saved, with_optimizer),
        "resumed_difference": max_difference(onward, resumed),
        "resumed_logprob_difference": max_difference(later, forward_logprobs(client)),
        "fresh_optimizer_difference": max_difference(onward, fresh),
        "same_name_again": error_of(lambda: client.save_state("s1").result()),
        "overwritten": client.save_state("s1", overwrite=True).result().path == path,
        "unknown_path": error_of(lambda: client.load_state(path.replace("s1", "s2")).result()),
    }


def create_from_state():
    service = new_service()
    client = new_client(service, rank=4)
    step(client)
    saved = forward_logprobs(client)
    path = client.save_state("s1").result().path
    onward = [step(client), step(client), step(client)]
    plain = ready(service.create_training_client_from_state(path))
    full = ready(service.create_training_client_from_state_with_optimizer(path))
    facts = {
        "model_ids": [str(c.model_id) for c in (client, plain, full)],
        "ranks": [c.get_info().lora_rank for c in (client, plain, full)],
        "weights_difference": max_difference(saved, forward_logprobs(plain)),
        "weights_difference_with_optimizer": max_difference(saved, forward_logprobs(full)),
    }
    fresh = [step(plain), step(plain), step(plain)]
    resumed = [step(full), step(full), step(full)]
    facts["resumed_difference"] = max_difference(onward, resumed)
    facts["fresh_optimizer_difference"] = max_difference(onward, fresh)
    return facts


def unnamed_sampler():
    client = new_client()
    for _ in range(3):
        step(client)
    sampler = ready(client.save_weights_and_get_sampling_client())
    reply = sample(sampler, TOKENS[:3], temperature=0.0, max_tokens=5)
    expected = forward_logprobs(client)
    scored = sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result()
    step(client)
    return {
        "reply": reply,
        "logprob_difference": max_difference(expected, scored[1:]),
        "kept_after_training": sample(sampler, TOKENS[:3], temperature=0.0, max_tokens=5) == reply,
    }


def named_sampler():
    service = new_service()
    client = new_client(service)
    step(client)
    path = client.save_weights_for_sampler("sampler-1").result().path
    sampler = ready(service.create_sampling_client(model_path=path))
    greedy = sample(sampler, temperature=0.0)
    many = sample(sampler, num_samples=4, seed=5)
    stop = greedy[0]["tokens"][1]
    return {
        "path": path,
        "greedy": greedy,
        "greedy_is_top_1": sample(sampler, top_k=1)[0]["tokens"] == greedy[0]["tokens"],
        "greedy_is_top_0p": sample(sampler, top_p=1e-6)[0]["tokens"] == greedy[0]["tokens"],
        "num_samples": len(many),
        "num_distinct": len({tuple(s["tokens"]) for s in many}),
        "repeats_with_seed": sample(sampler, num_samples=4, seed=5) == many,
        "differs_with_other_seed": sample(sampler, num_samples=4, seed=6) != many,
        "stopped": sample(sampler, temperature=0.0, stop=[stop])[0],
        "stop_token": stop,
        "one_token": sample(sampler, max_tokens=1)[0],
        "from_training_client": len(sample(ready(client.create_sampling_client(path)))),
    }


def stop_strings():
    service = new_service()
    tokenizer = new_client(service).get_tokenizer()
    sampler = ready(service.create_sampling_client(base_model=MODEL))
    prompt = tokenizer.encode("Once upon a time", add_special_tokens=False)
    free = sample(sampler, prompt, temperature=0.0, max_tokens=12)[0]
    text = tokenizer.decode(free["tokens"])
    word = text[len(text) // 2 : len(text) // 2 + 2]
    one = sample(sampler, prompt, temperature=0.0, max_tokens=12, stop=word)[0]
    several = sample(sampler, prompt, temperature=0.0, max_tokens=12, stop=["\u2603", word])[0]
    facts = {"text": text, "stop": word, "stopped_text": tokenizer.decode(one["tokens"])}
    return {**facts, "stop_reason": one["stop_reason"], "same_with_list": several == one}


def base_model_sampler():
    sampler = ready(new_service().create_sampling_client(base_model=MODEL))
    return {"base_model": sampler.get_base_model(), "reply": sample(sampler, num_samples=2)}


def prompt_logprobs():
    service = new_service()
    sampler = ready(service.create_sampling_client(base_model=MODEL))
    prompt = types.ModelInput.from_ints(TOKENS)
    scored = sampler.compute_logprobs(prompt).result()
    reply = sampler.sample(
        prompt,
        1,
        types.SamplingParams(max_tokens=2, temperature=0.0),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
    ).result()
    rows = reply.topk_prompt_logprobs
    by_rank = [[x for _, x in row] for row in rows if row]
    return {
        "first": scored[0],
        "num": len(scored),
        "difference": max_difference(scored[1:], reply.prompt_logprobs[1:]),
        "difference_to_forward": max_difference(scored[1:], forward_logprobs(new_client(service))),
        "topk_first": rows[0],
        "topk_widths": [len(row) for row in rows if row],
        "topk_sorted": all(row == sorted(row, reverse=True) for row in by_rank),
    }


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


def listings():
    service = new_service()
    client = new_client(service, rank=4)
    step(client)
    state = client.save_state("s1").result().path
    named = client.save_weights_for_sampler("n1").result().path
    rest = rest_client(service)
    run = rest.get_training_run(client.model_id).result()
    by_path = rest.get_training_run_by_tinker_path(state).result()
    runs = rest.list_training_runs(limit=100).result()
    own = rest.list_checkpoints(client.model_id).result().checkpoints
    everything = rest.list_user_checkpoints(limit=100).result().checkpoints
    info = rest.get_weights_info_by_tinker_path(state).result()
    session_id = client.model_id.split(":")[0]
    return {
        "paths": [state, named],
        "run": {"id": run.training_run_id, "base_model": run.base_model, "rank": run.lora_rank},
        "by_path": by_path.training_run_id == run.training_run_id,
        "is_listed": client.model_id in [r.training_run_id for r in runs.training_runs],
        "total": runs.cursor.total_count,
        "checkpoints": sorted(c.tinker_path for c in own),
        "are_listed": {state, named} <= {c.tinker_path for c in everything},
        "weights": {"base_model": info.base_model, "is_lora": info.is_lora, "rank": info.lora_rank},
        "session_runs": list(rest.get_session(session_id).result().training_run_ids),
        "session_is_listed": session_id in rest.list_sessions(limit=1000).result().sessions,
        "unknown_run": error_of(lambda: rest.get_training_run("no-such:train:0").result()),
    }


def checkpoint_management():
    service = new_service()
    client = new_client(service, rank=4)
    step(client)
    path = client.save_state("s1").result().path
    expiring = client.save_state("s2", ttl_seconds=7200).result().path
    rest = rest_client(service)

    def checkpoint(wanted):
        found = rest.list_checkpoints(client.model_id).result().checkpoints
        return next((c for c in found if c.tinker_path == wanted), None)

    rest.publish_checkpoint_from_tinker_path(path).result()
    facts = {"published": checkpoint(path).public}
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    facts["unpublished"] = not checkpoint(path).public
    facts["saved_with_ttl"] = checkpoint(expiring).expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    facts["expires"] = checkpoint(path).expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    facts["lasts"] = checkpoint(path).expires_at is None
    rest.delete_checkpoint_from_tinker_path(path).result()
    facts["deleted"] = checkpoint(path) is None
    facts["loading_the_deleted"] = error_of(lambda: client.load_state(path).result())
    facts["still_works"] = step(client)
    return facts


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


def many_samples():
    """Two hundred samples in flight."""
    sampler = ready(new_service().create_sampling_client(base_model=MODEL))
    params = types.SamplingParams(max_tokens=8, temperature=1.0)
    started_at = time.monotonic()
    futures = [sampler.sample(types.ModelInput.from_ints([i % 50 + 1, 2, 3]), 1, params) for i in range(200)]
    lengths = [len(future.result().sequences[0].tokens) for future in futures]
    duration_s = time.monotonic() - started_at
    return {"num_replies": len(lengths), "longest": max(lengths), "duration_s": duration_s}


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


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
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
        save_and_load,
        create_from_state,
        unnamed_sampler,
        named_sampler,
        stop_strings,
        base_model_sampler,
        prompt_logprobs,
        custom_loss,
        chunked_batch,
        failed_future,
        out_of_vocabulary,
        listings,
        checkpoint_management,
        hundred_batches,
        concurrent_runs,
        many_samples,
        double_await,
        guide_style,
    )
}


def main(names):
    if names == ["list"]:
        sys.stdout.write("\n".join(SCENARIOS) + "\n")
        return 0
    num_failed = 0
    for name in SCENARIOS if names == ["all"] else names:
        line = {"scenario": name, "sdk": f"{sdk.__name__} {sdk.__version__}"}
        started_at = time.monotonic()
        try:
            line |= SCENARIOS[name]()
        except Exception:  # noqa: BLE001 - the others are to run all the same
            line["failed"] = traceback.format_exc()
            num_failed += 1
        line["took_s"] = round(time.monotonic() - started_at, 3)
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
