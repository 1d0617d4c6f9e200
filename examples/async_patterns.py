import asyncio
import mint
from mint import types


async def train_with_pipelining():
    service_client = mint.ServiceClient()
    training_client = await service_client.create_lora_training_client_async(
        base_model="Qwen/Qwen3-0.6B",
        rank=16,
    )
    tokenizer = training_client.get_tokenizer()
    adam_params = types.AdamParams(learning_rate=5e-5)

    # Prepare batches
    batches = [
        "Example batch 1 for training.",
        "Example batch 2 for training.",
        "Example batch 3 for training.",
        "Example batch 4 for training.",
    ]

    # Anti-pattern (slow): sequential calls
    # for batch_text in batches:
    #     tokens = tokenizer.encode(batch_text)
    #     datum = types.Datum(...)
    #     result = await training_client.forward_backward_async(...).result_async()
    #     await training_client.optim_step_async(adam_params).result_async()

    # Pattern (fast): pipeline multiple forward_backward calls
    fb_futures = []
    for batch_text in batches:
        tokens = tokenizer.encode(batch_text)
        model_input = types.ModelInput.from_ints(tokens[:-1])
        target_tokens = tokens[1:]
        weights = [1.0] * len(target_tokens)

        datum = types.Datum(
            model_input=model_input,
            loss_fn_inputs={"target_tokens": target_tokens, "weights": weights},
        )

        # Submit without waiting
        fb_future = training_client.forward_backward_async([datum], loss_fn="cross_entropy")
        fb_futures.append(fb_future)

    # Gather and await all results in parallel
    fb_results = await asyncio.gather(*[f.result_async() for f in fb_futures])

    # Then do optimizer step
    for result in fb_results:
        print(f"Loss: {result.loss:.4f}")

    optim_future = training_client.optim_step_async(adam_params)
    await optim_future.result_async()


# Run the async training
asyncio.run(train_with_pipelining())
