"""What samplers answer: of named and unnamed weights and of the base model."""
# mypy: ignore-errors

from __future__ import annotations

import time

from client import (
    MODEL,
    TOKENS,
    forward_logprobs,
    max_difference,
    new_client,
    new_service,
    ready,
    sample,
    step,
    types,
)


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


def many_samples():
    """Two hundred samples in flight."""
    sampler = ready(new_service().create_sampling_client(base_model=MODEL))
    params = types.SamplingParams(max_tokens=8, temperature=1.0)
    started_at = time.monotonic()
    futures = [sampler.sample(types.ModelInput.from_ints([i % 50 + 1, 2, 3]), 1, params) for i in range(200)]
    lengths = [len(future.result().sequences[0].tokens) for future in futures]
    duration_s = time.monotonic() - started_at
    return {"num_replies": len(lengths), "longest": max(lengths), "duration_s": duration_s}


SCENARIOS = (unnamed_sampler, named_sampler, stop_strings, base_model_sampler, prompt_logprobs, many_samples)
