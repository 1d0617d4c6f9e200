"""Fine-tunes the tiny model on questions and answers, with several batches always on their way.

    MINT_BASE_URL=http://127.0.0.1:8000 MINT_API_KEY=tml-... python examples/sft_loop.py

Runs with this project's mint, the published mint, and tinker itself (then TINKER_BASE_URL and
TINKER_API_KEY). Also needs transformers and jinja2, for the tokenizer.
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
STEPS, BATCH_SIZE, SUBMIT_AHEAD = int(os.environ.get("SFT_STEPS", "40")), 8, 4


def ready(client):
    """Newer SDKs return a future of a client, older ones the client itself."""
    return client.result() if hasattr(client, "result") else client


def render(tokenizer, messages):
    """Return (prompt tokens, answer tokens)."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    assert full.startswith(prompt), "this chat template rewrites the prompt; pick another base model"
    parts = (prompt, full.removeprefix(prompt))
    return [tokenizer.encode(part, add_special_tokens=False) for part in parts]


def make_datum(prompt, answer):
    """Train on the answer only. Position t of the input predicts position t + 1."""
    weights = ([0.0] * len(prompt) + [1.0] * len(answer))[1:]
    model_input = sdk.types.ModelInput.from_ints((prompt + answer)[:-1])
    inputs = {"target_tokens": (prompt + answer)[1:], "weights": weights}
    return sdk.types.Datum(model_input=model_input, loss_fn_inputs=inputs), sum(weights)


def sample(client, tokenizer, prompt):
    sampler = ready(client.save_weights_and_get_sampling_client())
    params = sdk.types.SamplingParams(max_tokens=48, temperature=0.0, seed=1)
    reply = sampler.sample(sdk.types.ModelInput.from_ints(prompt), 1, params).result()
    return tokenizer.decode(reply.sequences[0].tokens, skip_special_tokens=True).strip()


def report(step, future, optim_future, num_tokens):
    loss = future.result().metrics["loss:sum"] / num_tokens
    optim_future.result()
    print(f"step {step:3d}  loss {loss:.4f}", flush=True)


def main():
    client = ready(
        sdk.ServiceClient().create_lora_training_client(base_model="mintweb/tiny", rank=16, seed=1)
    )
    tokenizer = client.get_tokenizer()
    rows = [json.loads(line)["messages"] for line in DATA.read_text().splitlines() if line]
    data = [make_datum(*render(tokenizer, messages)) for messages in rows]
    question = rows[0][-2]["content"]
    prompt = render(tokenizer, rows[0])[0]
    print(f"before  {question} -> {sample(client, tokenizer, prompt)}")

    pending = deque()
    for step in range(STEPS):
        picked = [data[(step * BATCH_SIZE + i) % len(data)] for i in range(BATCH_SIZE)]
        datums, num_tokens = zip(*picked, strict=True)
        future = client.forward_backward(list(datums), "cross_entropy")
        optim_future = client.optim_step(sdk.types.AdamParams(learning_rate=1e-3))
        pending.append((step, future, optim_future, sum(num_tokens)))
        if len(pending) > SUBMIT_AHEAD:
            report(*pending.popleft())
    for entry in pending:
        report(*entry)
    print(f"after   {question} -> {sample(client, tokenizer, prompt)}")


if __name__ == "__main__":
    main()
