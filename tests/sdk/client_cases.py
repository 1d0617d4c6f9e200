"""Uses of this project's mint package, run inside a client environment: `client_cases.py CASE`.

Each case prints one JSON line of facts. The tests beside it start it and judge the facts.
"""
# mypy: ignore-errors

from __future__ import annotations

import asyncio
import inspect
import json
import pickle
import sys
import time

import mint
import mint.mint as mintx
from mint import types

ADAM = types.AdamParams(learning_rate=1e-4)
BAD_TOKEN = 5000


def datum(*tokens, weight=1.0):
    inputs = {"target_tokens": list(tokens[1:]), "weights": [weight] * (len(tokens) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens[:-1])), loss_fn_inputs=inputs)


GOOD, BAD = datum(1, 2, 3, 4), datum(1, BAD_TOKEN, 3)


async def new_client():
    return await mint.ServiceClient().create_lora_training_client_async(base_model="mintweb/tiny", rank=4)


async def submits_at_once():
    """The server gives no result before four operations are there."""
    client = await new_client()
    futures = [client.forward_backward_async([GOOD], loss_fn="cross_entropy") for _ in range(3)]
    step = client.optim_step_async(ADAM)
    results = await asyncio.gather(*[future.result_async() for future in futures])
    again = await asyncio.gather(*futures)
    step_result = await step.result_async()
    return {
        "losses": [result.loss for result in results],
        "metrics": results[0].metrics,
        "same_again": all(one is two for one, two in zip(results, again, strict=True)),
        "is_tinker_result": isinstance(results[0], types.ForwardBackwardOutput),
        "num_logprobs": len(results[0].loss_fn_outputs[0]["logprobs"].data),
        "step": step_result.metrics,
    }


async def awaits_once_or_twice():
    client = await new_client()
    twice = await client.forward_backward_async([GOOD], "cross_entropy")
    result = await twice.result_async()
    held = client.forward_backward_async([GOOD], "cross_entropy")
    once = await held
    step = await client.optim_step_async(ADAM)
    step_result = await step.result_async()
    saved = await (await client.save_state_async("state")).result_async()
    return {
        "losses": [
            result.loss,
            twice.loss,
            once.loss,
            (await once).loss,
            held.result().loss,
            once.result(1).loss,
        ],
        "step": step_result.metrics,
        "path": saved.path,
    }


async def fails_one_of_three():
    client = await new_client()
    futures = [client.forward_backward_async([d], "cross_entropy") for d in (GOOD, BAD, GOOD)]
    try:
        await asyncio.gather(*[future.result_async() for future in futures])
        error = None
    except mint.RequestFailedError as caught:
        error = str(caught)
    others = [(await futures[i].result_async()).loss for i in (0, 2)]
    step = await client.optim_step_async(ADAM).result_async()
    empty = client.forward_backward_async([], "cross_entropy")
    try:
        await empty
        empty_error = None
    except ValueError as caught:
        empty_error = type(caught).__name__
    return {"error": error, "others": others, "step": step.metrics, "empty_error": empty_error}


async def leaves_the_loop_free():
    """The server holds the first result until a second operation comes, which this loop sends."""
    client = await new_client()

    async def second():
        await asyncio.sleep(0.2)
        return await client.optim_step_async(ADAM)

    first = client.forward_backward_async([GOOD], "cross_entropy")
    result, step = await asyncio.gather(first, second())
    return {"loss": result.loss, "step": step.metrics}


async def survives_giving_up():
    client = await new_client()
    first = client.forward_backward_async([GOOD], "cross_entropy")
    errors = []
    for wait in (first.result_async(0.05), asyncio.wait_for(first, 0.05)):
        try:
            await wait
        except TimeoutError as caught:
            errors.append(type(caught).__name__)
    try:
        first.result(0.05)
    except TimeoutError as caught:
        errors.append(type(caught).__name__)
    was_done = first.done()
    step = await client.optim_step_async(ADAM)
    return {"errors": errors, "was_done": was_done, "loss": (await first).loss, "step": step.metrics}


async def keeps_the_order():
    client = await new_client()

    def loss_fn(data, logprobs):
        time.sleep(0.2)
        loss = sum(p.sum() for p in logprobs) * 3
        return loss, {"mine": 1.0}

    custom = client.forward_backward_custom_async([GOOD], loss_fn)
    step = client.optim_step_async(ADAM)
    named = client.save_weights_for_sampler_async("named")
    sampler = client.save_weights_and_get_sampling_client_async()
    last = client.optim_step(ADAM)
    result = await custom
    logprobs = result.loss_fn_outputs[0]["logprobs"].data
    reply = await (await sampler).sample_async(
        types.ModelInput.from_ints([1, 2]), 2, types.SamplingParams(max_tokens=3)
    )
    return {
        "loss": result.loss,
        "expected_loss": 3 * sum(logprobs),
        "mine": result.metrics["mine"],
        "steps": [(await step).metrics["step"], (await last).metrics["step"]],
        "path": (await named).path,
        "num_sequences": len(reply.sequences),
    }


async def survives_a_failing_custom_loss():
    client = await new_client()

    def loss_fn(data, logprobs):
        raise ArithmeticError("my loss is broken")

    custom = client.forward_backward_custom_async([GOOD], loss_fn)
    try:
        await custom
        error = None
    except ArithmeticError as caught:
        error = str(caught)
    other = await new_client()
    step = await other.optim_step_async(ADAM)
    return {"error": error, "step": step.metrics}


async def covers_every_client():
    service = mint.ServiceClient()
    capabilities = service.get_server_capabilities_async()
    created = service.create_lora_training_client_async(base_model="mintweb/tiny", rank=4)
    base_sampler = service.create_sampling_client_async(base_model="mintweb/tiny")
    client = await created.result_async()
    await client.forward_backward_async([GOOD], "cross_entropy")
    await client.optim_step_async(ADAM)
    state = await client.save_state_async("s1")
    loaded = await client.load_state_async(state.path)
    await client.load_state_with_optimizer_async(state.path)
    resumed = [
        service.create_training_client_from_state_async(state.path),
        service.create_training_client_from_state_with_optimizer_async(state.path),
    ]
    resumed = await asyncio.gather(*resumed)
    saved = await client.save_weights_for_sampler_async("s2")
    samplers = await asyncio.gather(
        base_sampler,
        service.create_sampling_client_async(model_path=saved.path),
        client.create_sampling_client_async(saved.path),
        client.save_weights_and_get_sampling_client_async(),
    )
    prompt, params = types.ModelInput.from_ints([1, 2, 3]), types.SamplingParams(max_tokens=4, stop=[2])
    sample_futures = [s.sample_async(prompt, num_samples=2, sampling_params=params) for s in samplers]
    replies = await asyncio.gather(*[future.result_async() for future in sample_futures])
    logprobs = await samplers[0].compute_logprobs_async(prompt).result_async()
    rest = service.create_rest_client()
    runs = await rest.list_training_runs_async()
    await rest.set_checkpoint_ttl_from_tinker_path_async(state.path, 7200)
    checkpoints = await rest.list_checkpoints_async(client.model_id).result_async()
    clone = pickle.loads(pickle.dumps(samplers[1]))
    cloned = await clone.sample_async(prompt, 1, params)
    return {
        "models": [m.model_name for m in (await capabilities).supported_models],
        "classes": sorted({type(c).__module__ for c in (client, *resumed, *samplers, rest, clone)}),
        "info": (await client.get_info_async()).lora_rank,
        "loaded": type(loaded).__name__,
        "resumed_ids": len({c.model_id for c in (client, *resumed)}),
        "resumed_steps": [(await c.optim_step_async(ADAM)).metrics["step"] for c in resumed],
        "num_sequences": [len(reply.sequences) for reply in replies],
        "stop_reasons": [s.stop_reason for s in replies[0].sequences],
        "cloned": len(cloned.sequences),
        "logprobs": logprobs,
        "base_model": isinstance(await samplers[0].get_base_model_async(), str),
        "num_runs": len(runs.training_runs),
        "checkpoints": [c.checkpoint_id for c in checkpoints.checkpoints],
    }


def works_without_a_loop():
    service = mint.ServiceClient()
    models = service.get_server_capabilities().supported_models
    created = service.create_lora_training_client(base_model="mintweb/tiny", rank=4)
    client = created.result()
    future = created.forward_backward([GOOD], "cross_entropy")
    step = client.optim_step(ADAM)
    output = future.result(timeout=120)
    saved = client.save_state("s").result()
    client.load_state(saved.path).result()
    client.load_state_with_optimizer(saved.path).result()
    resumed = service.create_training_client_from_state(saved.path)
    sampler = client.save_weights_and_get_sampling_client()
    prompt = types.ModelInput.from_ints([1, 2, 3])
    reply = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=3)).result()
    by_path = service.create_sampling_client(model_path=saved.path).compute_logprobs(prompt).result()
    return {
        "models": len(models),
        "loss": output.loss,
        "step": step.result().metrics,
        "resumed": resumed.model_id != client.model_id,
        "tokens": list(reply.sequences[0].tokens),
        "logprobs": by_path,
        "is_future": isinstance(future, mint.APIFuture) and isinstance(future, mint.Future),
    }


async def reaches_the_extensions():
    service = mint.ServiceClient()
    client = await service.create_lora_training_client_async(base_model="mintweb/tiny", rank=4)
    tokens = types.ModelInput.from_ints([1, 2])
    target = types.TensorData(data=[2, 3], dtype="int64", shape=[2])
    weights = types.TensorData(data=[1.0, 1.0], dtype="float32", shape=[2])
    row = mintx.ReverseKLDatum(
        student_input=tokens, reference_input=tokens, target_tokens=target, weights=weights
    )
    kl = mintx.forward_backward_reverse_kl_async(client, reference_model_path="tinker://a/b/c", data=[row])
    merged = await asyncio.to_thread(
        mintx.interpolate_checkpoints,
        service,
        source_paths=["tinker://a/b/c"],
        coefficients=[1.0],
        output_path="m",
    )
    return {"kl": (await kl).outputs[0].loss.data, "metrics": (await kl).metrics, "merged": merged.path}


def lists_exports():
    return {"top": mint.__all__, "mint": mintx.__all__, "tinker": mint.tinker.__version__}


def lists_coroutines():
    """`*_async` methods that are still tinker's own coroutines."""
    classes = (mint.ServiceClient, mint.TrainingClient, mint.SamplingClient, mint.RestClient)
    methods = [(cls, name) for cls in classes for name in dir(cls) if name.endswith("_async")]
    methods = [(cls, name) for cls, name in methods if not name.startswith("_") and name != "result_async"]
    names = [f"{c.__name__}.{n}" for c, n in methods if inspect.iscoroutinefunction(getattr(c, n))]
    return {"coroutines": names, "num_methods": len(methods)}


if __name__ == "__main__":
    case = globals()[sys.argv[1]]
    sys.stdout.write(json.dumps(asyncio.run(case()) if inspect.iscoroutinefunction(case) else case()))
