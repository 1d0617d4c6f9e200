"""Measures of a tiny model: held-out loss, right answers to held-out questions, greedy and drawn samples.

Called by `train.py` at the end of a run and by the tests on the shipped files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from gpuworker.tiny.corpus import END_OF_TEXT, TURN_END, Split, Turn, documents, render_chat, split_of

HELD_OUT_SEED = 20_000
# Axes: B rows, T tokens, V vocabulary.


def token_rows(tokenizer: Tokenizer, split: Split, *, seed: int, row_tokens: int) -> Iterator[list[int]]:
    """Yield rows of exactly row_tokens ids: whole documents from the row's start, the last one cut off."""
    row: list[int] = []
    for document in documents(split, seed=seed):
        row += tokenizer.encode(document.text + END_OF_TEXT).ids
        if len(row) >= row_tokens:
            yield row[:row_tokens]
            row = []


def next_token_loss(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Return the mean loss, in nats per token, of predicting each token from those before it."""
    logits_BTV: Tensor = model(input_ids=tokens_BT, use_cache=False).logits
    return functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, tokenizer: Tokenizer, *, num_rows: int, row_tokens: int) -> float:
    """Return the mean loss in nats per token on rows of documents that training never saw."""
    rows = islice(token_rows(tokenizer, Split.HELD_OUT, seed=HELD_OUT_SEED, row_tokens=row_tokens), num_rows)
    losses = [next_token_loss(model, torch.tensor([row])).item() for row in rows]
    return sum(losses) / len(losses)


@torch.no_grad()
def held_out_loss_by_kind(model: nn.Module, tokenizer: Tokenizer, *, num_documents: int) -> dict[str, float]:
    """Return the mean loss in nats per token of each kind of held-out document, read one at a time."""
    sums: dict[str, tuple[float, int]] = {}
    for document in islice(documents(Split.HELD_OUT, seed=HELD_OUT_SEED), num_documents):
        tokens_BT = torch.tensor([tokenizer.encode(document.text).ids])
        num_predicted = tokens_BT.shape[1] - 1
        total, count = sums.get(document.kind, (0.0, 0))
        total += next_token_loss(model, tokens_BT).item() * num_predicted
        sums[document.kind] = (total, count + num_predicted)
    return {kind: total / count for kind, (total, count) in sorted(sums.items())}


@torch.no_grad()
def complete(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Return the continuation of prompt up to and including <|im_end|> or <|endoftext|>; greedy at temperature 0."""
    ids = tokenizer.encode(prompt).ids
    stops = {tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END_OF_TEXT)}
    generator = torch.Generator().manual_seed(seed)
    new: list[int] = []
    fed, cache = torch.tensor([ids]), None
    while len(new) < max_tokens and not (new and new[-1] in stops):
        output = model(input_ids=fed, past_key_values=cache, use_cache=True)
        logits_V, cache = output.logits[0, -1].float(), output.past_key_values
        if temperature:
            token = int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits_V.argmax())
        new.append(token)
        fed = torch.tensor([[token]])
    return str(tokenizer.decode(new, skip_special_tokens=False))


def ask(
    model: nn.Module, tokenizer: Tokenizer, question: str, *, max_tokens: int = 200, temperature: float = 0.0
) -> str:
    """Return the model's reply to one user message, with its closing <|im_end|>."""
    prompt = render_chat([{"role": "user", "content": question}]) + "<|im_start|>assistant\n"
    return complete(model, tokenizer, prompt, max_tokens=max_tokens, temperature=temperature)


def held_out_turns(write_turn: Callable[[Random], Turn], *, seed: int) -> Iterator[Turn]:
    """Yield turns whose one-turn chat is held out, so that this very document was not trained on."""
    rng = Random(seed)  # noqa: S311 - text, not secrets
    while True:
        said, reply = write_turn(rng)
        chat = render_chat([{"role": "user", "content": said}, {"role": "assistant", "content": reply}])
        if split_of(chat) is Split.HELD_OUT:
            yield said, reply


def share_right(model: nn.Module, tokenizer: Tokenizer, turns: Sequence[Turn]) -> float:
    """Return the share of turns that the model answers word for word as the corpus would."""
    rights = [ask(model, tokenizer, said, max_tokens=40) == reply + TURN_END for said, reply in turns]
    return sum(rights) / len(rights)
