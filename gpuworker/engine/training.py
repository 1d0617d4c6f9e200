"""One packed forward_backward cycle: jobs of many adapters through the base model together.

Checks every job, cuts it into blocks, packs blocks of several jobs into batches and gives each
job its own gradient buffer, which reaches the adapter only when the whole job has succeeded.
Axes: T rows of the batch, N rows of one block, K targets per row, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpuworker.engine.adapters import Adapter
from gpuworker.engine.base_model import BaseModel
from gpuworker.engine.batching import PackedRows, cut_into_blocks, fill_batches, pack_rows
from gpuworker.engine.exceptions import DatumError, EngineError, NonFiniteError, OutOfMemory
from gpuworker.engine.jobs import MAX_TARGETS, Block, Job, build_block, check_datum, num_targets
from gpuworker.engine.logprobs import Head, HeadPiece, LossTerms, PieceScore
from gpuworker.engine.lora import Segment
from gpuworker.engine.lora_stack import AdapterRows
from gpuworker.engine.losses import BoundLoss, bind
from gpuworker.engine.memory import free_cache, is_out_of_memory
from gpuworker.engine.passes import Pass, PlainPass
from gpuworker.engine.train_graphs import TrainGraphs
from gpuworker.engine.types import ForwardBackward, ForwardBackwardResult, Int64Array

Place: TypeAlias = Callable[[npt.NDArray[Any]], Tensor]


class Trainer:
    """Runs cycles on one base model.

    Args:
        token_budget: rows of one batch and of one block.
        graphs: recorded passes, for a device that waits for launches.

    `on_batch` is called after each batch: a job may take long, but none of its batches does.
    """

    def __init__(
        self, base: BaseModel, head: Head, *, token_budget: int, graphs: TrainGraphs | None = None
    ) -> None:
        self._base = base
        self._head = head
        self._token_budget = token_budget
        self._graphs = graphs
        self._ill: WeakSet[Adapter] = WeakSet()
        self.on_batch: Callable[[], None] = lambda: None

    def run(
        self, requests: Sequence[ForwardBackward], find_adapter: Callable[[str], Adapter]
    ) -> list[ForwardBackwardResult | EngineError]:
        """Return a result or an error for every request; gradients add up in request order."""
        outcomes: dict[int, ForwardBackwardResult | EngineError] = {}
        jobs: dict[int, Job] = {}
        for index, request in enumerate(requests):
            try:
                jobs[index] = self._prepare(request, find_adapter(request.adapter_id))
            except EngineError as error:
                outcomes[index] = error
        for backward in (True, False):
            chosen = {index: job for index, job in jobs.items() if job.request.backward is backward}
            outcomes.update(self._run_jobs(chosen))
        return [outcomes[index] for index in range(len(requests))]

    def release_unused(self) -> None:
        """Give back what is kept for later passes."""
        if self._graphs is not None:
            self._graphs.release()

    def _prepare(self, request: ForwardBackward, adapter: Adapter, token_budget: int | None = None) -> Job:
        loss = bind(request.loss_fn, request.loss_config)
        if not request.data:
            raise DatumError("a forward_backward needs at least one datum")
        if len({"weights" in datum.inputs for datum in request.data}) > 1:
            raise DatumError("some data have weights and others none")
        for index, datum in enumerate(request.data):
            check_datum(datum, index, vocab_size=self._base.vocab_size, max_context=self._base.max_context)
        budget = token_budget or self._token_budget
        cuts = cut_into_blocks([len(datum.tokens) for datum in request.data], budget)
        width = max(num_targets(datum) for datum in request.data)
        num_tokens = sum(len(datum.tokens) for datum in request.data)
        if width > 1 and num_tokens * width > MAX_TARGETS:
            raise DatumError(f"{num_tokens} tokens with {width} targets each; {MAX_TARGETS} targets fit")
        blocks = [build_block([request.data[i] for i in cut], loss, width) for cut in cuts]
        return Job(request, adapter, loss, blocks)

    def _run_jobs(self, jobs: Mapping[int, Job]) -> dict[int, ForwardBackwardResult | EngineError]:
        """Run jobs packed; when the device has no room for them together, one after another."""
        outcomes: dict[int, ForwardBackwardResult | EngineError] = {}
        try:
            self._run_packed(jobs, outcomes)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.release_unused()
            left = {index: job for index, job in jobs.items() if index not in outcomes}
            for job in left.values():
                job.reset()
            if len(jobs) == 1:
                return {index: self._run_smaller(job) for index, job in left.items()}
            for index, job in left.items():
                outcomes.update(self._run_jobs({index: job}))
        return outcomes

    def _run_smaller(self, job: Job) -> ForwardBackwardResult | EngineError:
        """Run a job that has no room even alone once more, in batches of half the size.

        Its sums then add up in another order: the last bits may differ from those of a device with more room.
        """
        free_cache(self._base.device)
        budget = max(self._token_budget // 2, 1)
        outcomes: dict[int, ForwardBackwardResult | EngineError] = {}
        try:
            self._run_packed({0: self._prepare(job.request, job.adapter, budget)}, outcomes, budget)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return OutOfMemory(f"no room for this forward_backward: {error}")
        return outcomes[0]

    def _run_packed(
        self,
        jobs: Mapping[int, Job],
        outcomes: dict[int, ForwardBackwardResult | EngineError],
        token_budget: int | None = None,
    ) -> None:
        budget = token_budget or self._token_budget
        for part in self._batches(jobs, budget):
            self._run_batch([(job, block) for _, job, block in part])
            self.on_batch()
            done = {index: job for index, job, _ in part if job.is_done and index not in outcomes}
            sums = self._gradient_sums(list(done.values()))
            for (index, job), gradient_sum in zip(done.items(), sums, strict=True):
                outcomes[index] = self._finish(job, gradient_sum, budget)

    def _batches(self, jobs: Mapping[int, Job], budget: int) -> Iterator[list[tuple[int, Job, Block]]]:
        """Yield the blocks of all jobs by batches; those of an adapter that was ill even alone have theirs to themselves."""
        apart = [[index] for index, job in jobs.items() if job.adapter in self._ill]
        together = [index for index, job in jobs.items() if job.adapter not in self._ill]
        for indices in (together, *apart):
            queue = [(index, jobs[index], block) for index in indices for block in jobs[index].blocks]
            # Adapters of one layout can share products.
            queue.sort(key=lambda entry: entry[1].adapter.spec.rank)
            for batch in fill_batches([block.num_rows for _, _, block in queue], budget):
                yield queue[batch.start : batch.stop]

    def _gradient_sums(self, jobs: Sequence[Job]) -> list[float]:
        """Add up the numbers of each job's gradient, fetched at once; 0 where there is none."""
        for job in jobs:
            self._base.group.add_up_gradient(job.adapter.layout, job.gradient_P)
        sums = [job.gradient_P.sum(dtype=torch.float64) for job in jobs if job.gradient_P is not None]
        found = iter(torch.stack(sums).tolist() if sums else ())
        return [0.0 if job.gradient_P is None else next(found) for job in jobs]

    def _finish(self, job: Job, gradient_sum: float, budget: int) -> ForwardBackwardResult | EngineError:
        """Return how a job ended; one whose numbers may be ill by those of its neighbours is run again by itself."""
        try:
            result = job.finish(gradient_sum)
        except NonFiniteError as error:
            if not job.is_exposed:
                if self._graphs is not None:
                    self._ill.add(job.adapter)
                return error
        else:
            self._ill.discard(job.adapter)
            return result
        job.reset()
        outcomes: dict[int, ForwardBackwardResult | EngineError] = {}
        self._run_packed({0: job}, outcomes, budget)
        return outcomes[0]

    def _run_batch(self, parts: Sequence[tuple[Job, Block]]) -> None:
        base = self._base
        rows = pack_rows([(tokens, 0) for _, block in parts for tokens in block.tokens])
        own_rows, pieces, owners, start = [], [], [], 0
        for job, block in parts:
            stop = start + block.num_rows
            segment = Segment(start, stop, job.adapter.weights, job.start_gradient())
            own_rows.append(AdapterRows(segment, job.adapter, job.gradient_P))
            for own in _head_rows(block, self._head.chunk_rows):
                pieces.append(_build_piece(job, block, own, start, base.place))
                owners.append((len(own_rows) - 1, own))
            start = stop
        backward = parts[0][0].request.backward
        jobs = dict.fromkeys(job for job, _ in parts)
        through = self._pass(rows, own_rows)
        for job in jobs:
            job.is_exposed |= len(jobs) > 1 and through.mixes
        hidden_TD = through.forward()
        scores = self._head.score(hidden_TD, pieces, through.zero_gradient() if backward else None)
        if backward:
            through.backward()
        _collect(parts, owners, scores)

    def _pass(self, rows: PackedRows, parts: Sequence[AdapterRows]) -> Pass:
        recorded = None if self._graphs is None else self._graphs.find(rows, parts)
        return recorded or PlainPass(self._base, rows, parts)


def _head_rows(block: Block, chunk_rows: int) -> list[Int64Array]:
    """Return the block's rows in pieces for the head: trained rows first, cut by own data only."""
    pieces = []
    for rows_N in (np.flatnonzero(block.trained_N), np.flatnonzero(~block.trained_N)):
        pieces += [rows_N[i : i + chunk_rows] for i in range(0, len(rows_N), chunk_rows)]
    return pieces


def _build_piece(job: Job, block: Block, own: Int64Array, start: int, place: Place) -> HeadPiece:
    is_trained = bool(block.trained_N[own[0]])
    return HeadPiece(
        rows_N=place(own + start),
        targets_NK=place(block.targets_NK[own]),
        weights=job.adapter.weights,
        gradients=job.gradients,
        loss_terms=_bind_terms(job.loss, block, own, place) if is_trained else None,
        backward=is_trained and job.request.backward,
    )


def _bind_terms(loss: BoundLoss, block: Block, own: Int64Array, place: Place) -> LossTerms:
    inputs = {name: place(values[own]) for name, values in block.inputs.items()}
    return lambda logprobs_NK: loss.terms(logprobs_NK, inputs)


def _collect(
    parts: Sequence[tuple[Job, Block]],
    owners: Sequence[tuple[int, Int64Array]],
    scores: Sequence[PieceScore],
) -> None:
    """Put the scores of one batch into the jobs they belong to.

    They leave the device in two copies, however many pieces there are: each copy waits for the device.
    """
    flat = torch.cat([score.logprobs_NK.flatten() for score in scores]).cpu().numpy()
    losses = torch.stack([score.loss for score in scores]).tolist()
    logprobs = [np.zeros(block.targets_NK.shape, dtype=np.float32) for _, block in parts]
    start = 0
    for (number, own), score, loss in zip(owners, scores, losses, strict=True):
        stop = start + score.logprobs_NK.numel()
        logprobs[number][own] = flat[start:stop].reshape(len(own), -1)
        parts[number][0].loss_sum += loss
        start = stop
    for (job, _), values_NK in zip(parts, logprobs, strict=True):
        job.logprobs.append(values_NK)
