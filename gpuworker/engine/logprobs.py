"""The head: target log-probabilities, loss terms and the gradient of the hidden states, in chunks.

Every loss is a sum of terms of single log-probabilities, so one chunk of logits gives its terms,
their gradient and with it the gradient of its hidden rows before the next chunk is made: nothing
of size rows x vocabulary outlives its chunk.
Axes: T rows of the batch, C rows of one chunk, N rows of one piece, K targets, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gpuworker.engine.adapters import UNEMBED, LoraPair, LoraWeights
from gpuworker.engine.batching import fill_batches, padded_size
from gpuworker.engine.lora import Segment, backward_pair
from gpuworker.engine.products import FrozenWeight, add_matmul

LossTerms: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class HeadPiece:
    """Rows of one job that go through the head together.

    `loss_terms` is None for rows that need no loss; `gradients` is None without a backward pass.

    Shapes:
        rows_N: int64, rows of the batch; targets_NK: int64.
    """

    rows_N: Tensor
    targets_NK: Tensor
    weights: LoraWeights | None
    gradients: Mapping[str, LoraPair] | None
    loss_terms: LossTerms | None
    backward: bool


class PieceScore(NamedTuple):
    """Log-probabilities (N, K) of one piece and its summed loss, a float64 scalar (0 without loss)."""

    logprobs_NK: Tensor
    loss: Tensor


class _Placed(NamedTuple):
    """A piece at its rows of the chunk, with the inner product of its head adapter."""

    piece: HeadPiece
    segment: Segment | None
    part: slice
    inner_NR: Tensor | None


class Head:
    """The frozen output projection and the routed adapters on it."""

    def __init__(self, weight: FrozenWeight, *, softcap: float | None, chunk_rows: int) -> None:
        self.weight = weight
        self.softcap = softcap
        self.chunk_rows = chunk_rows

    def base_logits(self, hidden_CD: Tensor) -> Tensor:
        """Return the frozen projection in float32, (C, V), before adapters and softcap."""
        if hidden_CD.is_cuda and hidden_CD.dtype != torch.float32:
            return torch.mm(hidden_CD, self.weight.plain.t(), out_dtype=torch.float32)
        return self.weight.product(hidden_CD).float()

    def cap(self, logits_CV: Tensor) -> Tensor:
        """Return the logits through the model's softcap, in place, where it has one."""
        if self.softcap is None:
            return logits_CV
        return logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)

    def logits(self, hidden_ND: Tensor, weights: LoraWeights | None) -> Tensor:
        """Return the logits (N, V), float32, of rows that share one adapter or none."""
        num_rows = len(hidden_ND)
        padding = hidden_ND.new_zeros(padded_size(num_rows) - num_rows, hidden_ND.shape[1])
        logits_NV = self.base_logits(torch.cat([hidden_ND, padding]))[:num_rows]
        if weights is not None and UNEMBED in weights.pairs:
            pair = weights.pairs[UNEMBED]
            add_matmul(logits_NV, hidden_ND.mm(pair.a.t()), pair.b.t(), weights.scaling)
        return self.cap(logits_NV)

    def score(
        self, hidden_TD: Tensor, pieces: Sequence[HeadPiece], grad_hidden_TD: Tensor | None
    ) -> list[PieceScore]:
        """Score all pieces in order; fill `grad_hidden_TD` and the head adapters' gradients.

        A piece is never cut, so a job's sums do not depend on its neighbours. Pieces with and
        without gradient do not share a chunk: the second matmul runs over trained rows only.

        Shapes:
            grad_hidden_TD: (T, D), zeros on entry; needed if a piece has `backward`.
        """
        scores: list[PieceScore | None] = [None] * len(pieces)
        for backward in (True, False):
            chosen = [index for index, piece in enumerate(pieces) if piece.backward is backward]
            sizes = [len(pieces[index].rows_N) for index in chosen]
            for chunk in fill_batches(sizes, self.chunk_rows):
                indices = [chosen[i] for i in chunk]
                done = self._score_chunk(hidden_TD, [pieces[i] for i in indices], grad_hidden_TD)
                for index, score in zip(indices, done, strict=True):
                    scores[index] = score
        return [score for score in scores if score is not None]

    @torch.no_grad()
    def _score_chunk(
        self, hidden_TD: Tensor, pieces: Sequence[HeadPiece], grad_hidden_TD: Tensor | None
    ) -> list[PieceScore]:
        rows_C = torch.cat([piece.rows_N for piece in pieces])
        hidden_CD = hidden_TD.index_select(0, _padded(rows_C))
        logits_CV = self.base_logits(hidden_CD)
        placed = self._add_adapters(hidden_CD, logits_CV, pieces)
        logits_CV = self.cap(logits_CV)
        chosen = [logits_CV[part].gather(1, piece.targets_NK) for piece, _, part, _ in placed]
        is_trained = pieces[0].backward and grad_hidden_TD is not None
        damping_CV = self._damping(logits_CV) if is_trained else None
        largest_C1 = logits_CV.amax(-1, keepdim=True)
        mass_CV = logits_CV.sub_(largest_C1).exp_()
        sums_C1 = mass_CV.sum(-1, keepdim=True)
        total_C1 = sums_C1.log().add_(largest_C1)
        logprobs = [
            values_NK.sub_(total_C1[part]) for values_NK, (_, _, part, _) in zip(chosen, placed, strict=True)
        ]
        losses, slopes = [], []
        for piece, chosen_NK in zip(pieces, logprobs, strict=True):
            loss, slope_NK = _loss_and_slope(piece, chosen_NK)
            losses.append(loss)
            slopes.append(slope_NK)
        if is_trained and grad_hidden_TD is not None:
            grad_CV = _logit_gradient(mass_CV, sums_C1, placed, slopes)
            grad_CD = self._backward(
                hidden_CD, grad_CV if damping_CV is None else grad_CV.mul_(damping_CV), placed
            )
            grad_hidden_TD.index_copy_(0, rows_C, grad_CD[: len(rows_C)])
        return [PieceScore(*pair) for pair in zip(logprobs, losses, strict=True)]

    def _add_adapters(
        self, hidden_CD: Tensor, logits_CV: Tensor, pieces: Sequence[HeadPiece]
    ) -> list[_Placed]:
        placed, start = [], 0
        for piece in pieces:
            part = slice(start, start + len(piece.rows_N))
            start, segment, inner_NR = part.stop, None, None
            if piece.weights is not None and UNEMBED in piece.weights.pairs:
                pair = piece.weights.pairs[UNEMBED]
                segment = Segment(part.start, part.stop, piece.weights, piece.gradients)
                inner_NR = hidden_CD[part].mm(pair.a.t())
                add_matmul(logits_CV[part], inner_NR, pair.b.t(), piece.weights.scaling)
            placed.append(_Placed(piece, segment, part, inner_NR))
        return placed

    def _damping(self, logits_CV: Tensor) -> Tensor | None:
        """Return the derivative of the softcap at capped logits, where the model has one."""
        return None if self.softcap is None else 1 - (logits_CV / self.softcap).square_()

    def _backward(self, hidden_CD: Tensor, grad_CV: Tensor, placed: Sequence[_Placed]) -> Tensor:
        """Return the gradient of the hidden rows, (C, D); add that of the head adapters."""
        grad_CV = grad_CV.to(self.weight.plain.dtype)
        grad_CD = self.weight.transposed_product(grad_CV)
        for _, segment, part, inner_NR in placed:
            if segment is not None and inner_NR is not None:
                grad_inner_NR = backward_pair(
                    segment, UNEMBED, grad_CV[part], inner_TR=inner_NR, rows_TD=hidden_CD[part]
                )
                pair = segment.weights.pairs[UNEMBED]
                grad_CD[part].addmm_(grad_inner_NR, pair.a, alpha=segment.weights.scaling)
        return grad_CD


def _logit_gradient(
    mass_CV: Tensor, sums_C1: Tensor, placed: Sequence[_Placed], slopes: Sequence[Tensor]
) -> Tensor:
    """Turn unscaled probabilities into the gradient of the logits, in place: the largest tensor is held once."""
    for (piece, _, part, _), slope_NK in zip(placed, slopes, strict=True):
        scale_N1 = slope_NK.sum(1, keepdim=True).neg_().div_(sums_C1[part])
        mass_CV[part].mul_(scale_N1).scatter_add_(1, piece.targets_NK, slope_NK)
    mass_CV[placed[-1].part.stop :] = 0
    return mass_CV


def _padded(rows_C: Tensor) -> Tensor:
    """Return the row numbers with copies of row 0 behind, up to the size of a batch."""
    missing = padded_size(len(rows_C)) - len(rows_C)
    return torch.cat([rows_C, rows_C.new_zeros(missing)]) if missing else rows_C


def _loss_and_slope(piece: HeadPiece, logprobs_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a piece and its derivative by every log-probability."""
    if piece.loss_terms is None:
        return logprobs_NK.new_zeros((), dtype=torch.float64), torch.zeros_like(logprobs_NK)
    if not piece.backward:
        return piece.loss_terms(logprobs_NK).sum(dtype=torch.float64), logprobs_NK
    with torch.enable_grad():
        leaf_NK = logprobs_NK.detach().requires_grad_()
        loss = piece.loss_terms(leaf_NK).sum(dtype=torch.float64)
        (slope_NK,) = torch.autograd.grad(loss, leaf_NK)
    return loss.detach(), slope_NK
