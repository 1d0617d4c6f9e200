"""Log-probabilities of the tokens of a prompt, and the likeliest tokens at each of its positions.

Axes: T rows of the batch, N tokens of the prompt, C rows of one chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpuworker.engine.adapters import LoraWeights
from gpuworker.engine.logprobs import Head
from gpuworker.engine.types import Float32Array, Int64Array, TopkLogprobs

_NO_LOGPROB = -99999.0


class PromptScores(NamedTuple):
    """Log-probability of every prompt token, the first NaN, and the top k where asked for."""

    logprobs: Float32Array
    topk: TopkLogprobs | None


def score_prompt(
    head: Head, hidden_ND: Tensor, prompt: Int64Array, weights: LoraWeights | None, *, top_k: int
) -> PromptScores:
    """Return the scores of one prompt from the hidden states of its N rows."""
    num_tokens = len(prompt)
    logprobs = np.full(num_tokens, np.nan, dtype=np.float32)
    ids = np.zeros((num_tokens, top_k), dtype=np.int64)
    best = np.full((num_tokens, top_k), _NO_LOGPROB, dtype=np.float32)
    for first in range(0, num_tokens - 1, head.chunk_rows):
        last = min(first + head.chunk_rows, num_tokens - 1)
        logits_CV = head.logits(hidden_ND[first:last], weights)
        logprobs_CV = logits_CV.log_softmax(-1)
        targets_C = torch.from_numpy(prompt[first + 1 : last + 1]).to(logprobs_CV.device)
        rows = slice(first + 1, last + 1)
        logprobs[rows] = logprobs_CV.gather(1, targets_C[:, None])[:, 0].cpu().numpy()
        if top_k:
            values, indices = logprobs_CV.topk(top_k, dim=-1)
            best[rows], ids[rows] = values.cpu().numpy(), indices.cpu().numpy()
    return PromptScores(logprobs, TopkLogprobs(token_ids=ids, logprobs=best) if top_k else None)
