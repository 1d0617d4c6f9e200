"""Teaches mintweb/tiny to answer like a pirate, with several batches always on their way.

Set MINT_BASE_URL and MINT_API_KEY (or TINKER_BASE_URL and TINKER_API_KEY) as `make up` prints them. Runs with
the published mint, with this project's mint, and with tinker; needs transformers and jinja2 for the tokenizer.
"""

import json
import os
from collections import deque
from pathlib import Path

try:
    import mint as sdk
except ImportError:
    import tinker as sdk

DATA = Path(os.environ.get("SFT_DATA", Path(__file__).parent / "data" / "pirate_qa.jsonl"))
STEPS, BATCH_SIZE, SUBMIT_AHEAD = int(os.environ.get("SFT_STEPS", "120")), 8, 4


def ready(made):
    return made.result() if hasattr(made, "result") else made  # tinker 0.38 returns futures of clients


def render(messages):
    """Return the tokens of the prompt and of the answer to it."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    answer = tokenizer.apply_chat_template(messages, tokenize=False).removeprefix(prompt)
    return [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer)]


def make_datum(messages):
    """Train on the answer alone; position t of the input predicts token t + 1."""
    prompt, answer = render(messages)
    tokens, weights = prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)
    inputs = {"target_tokens": tokens[1:], "weights": weights[1:]}
    return sdk.types.Datum(model_input=sdk.types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def ask(messages):
    sampler = ready(client.save_weights_and_get_sampling_client())
    params = sdk.types.SamplingParams(max_tokens=48, temperature=0.0)
    reply = sampler.sample(sdk.types.ModelInput.from_ints(render(messages)[0]), 1, params).result()
    return tokenizer.decode(reply.sequences[0].tokens, skip_special_tokens=True)


def report(step, future):
    metrics = future.result().metrics
    print(f"step {step:3d}  loss {metrics['loss:sum'] / metrics['loss_weight:sum']:.4f}", flush=True)


rows = [json.loads(line)["messages"] for line in DATA.read_text().splitlines() if line]
client = ready(sdk.ServiceClient().create_lora_training_client(base_model="mintweb/tiny", rank=16, seed=1))
tokenizer = client.get_tokenizer()
print(f"before  {rows[0][-2]['content']} -> {ask(rows[0])}")

pending = deque()
for step in range(STEPS):
    batch = [make_datum(rows[(step * BATCH_SIZE + i) % len(rows)]) for i in range(BATCH_SIZE)]
    pending.append((step, client.forward_backward(batch, "cross_entropy")))
    client.optim_step(sdk.types.AdamParams(learning_rate=1e-3))
    if len(pending) > SUBMIT_AHEAD:
        report(*pending.popleft())
while pending:
    report(*pending.popleft())
print(f"after   {rows[0][-2]['content']} -> {ask(rows[0])}")
