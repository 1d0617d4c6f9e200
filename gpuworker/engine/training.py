"""One packed forward_backward cycle: jobs of many adapters through the base model together.

Checks every job, cuts it into blocks, packs blocks of several jobs into batches and gives each
job its own gradient buffer, which reaches the adapter only when the whole job has succeeded.
Axes: T rows of the batch, N rows of one block, K targets per row, P parameters of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpuworker.engine.adapters import Adapter, LoraPair
from gpuworker.engine.base_model import BaseModel
from gpuworker.engine.batching import PackedRows, cut_into_blocks, fill_batches, pack_rows
from gpuworker.engine.exceptions import DatumError, EngineError, NonFiniteError, OutOfMemory
from gpuworker.engine.logprobs import Head, HeadPiece, LossTerms, PieceScore
from gpuworker.engine.lora import Segment
from gpuworker.engine.lora_stack import AdapterRows
from gpuworker.engine.losses import BoundLoss, bind
from gpuworker.engine.memory import free_cache, is_out_of_memory
from gpuworker.engine.passes import Pass, PlainPass
from gpuworker.engine.train_graphs import TrainGraphs
from gpuworker.engine.types import Datum, Float32Array, ForwardBackward, ForwardBackwardResult, Int64Array

Scalar = TypeVar("Scalar", bound=np.generic)
Place: TypeAlias = Callable[[npt.NDArray[Any]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Whole data of one job that always go through the model together.

    Shapes:
        targets_NK: int64; inputs: float32 (N, K) each; trained_N: bool, rows that carry loss.
            Data with fewer than K targets are filled up with target 0 and weight 0.
    """

    tokens: tuple[Int64Array, ...]
    targets_NK: Int64Array
    inputs: Mapping[str, Float32Array]
    trained_N: npt.NDArray[np.bool_]

    @property
    def num_rows(self) -> int:
        """Return N."""
        return len(self.targets_NK)


class Job:
    """One checked forward_backward with what has been computed of it so far."""

    def __init__(
        self, request: ForwardBackward, adapter: Adapter, loss: BoundLoss, blocks: list[Block]
    ) -> None:
        self.request = request
        self.adapter = adapter
        self.loss = loss
        self.blocks = blocks
        self.reset()

    def reset(self) -> None:
        """Forget everything computed."""
        self.gradient_P: Tensor | None = None
        self.gradients: Mapping[str, LoraPair] | None = None
        self.logprobs: list[Float32Array] = []
        self.loss_sum = 0.0
        self.is_exposed = False  # to numbers of other jobs that are not finite

    @property
    def is_done(self) -> bool:
        """Return whether every block has been through the model."""
        return len(self.logprobs) == len(self.blocks)

    def start_gradient(self) -> Mapping[str, LoraPair] | None:
        """Return the job's own gradient views, None for a forward only."""
        if self.request.backward and self.gradients is None:
            self.gradient_P = torch.zeros_like(self.adapter.master_P)
            self.gradients = self.adapter.layout.own_views(self.gradient_P)
        return self.gradients

    def finish(self, gradient_sum: float) -> ForwardBackwardResult:
        """Hand the gradient to the adapter and return the result.

        Args:
            gradient_sum: of all its numbers, in float64.
        Raises:
            NonFiniteError: loss, log-probabilities or gradient are not finite; nothing was added.
        """
        gradient_P, self.gradient_P, self.gradients = self.gradient_P, None, None
        if not math.isfinite(self.loss_sum):
            raise NonFiniteError(f"the loss is {self.loss_sum}")
        if not all(np.isfinite(values_NK).all() for values_NK in self.logprobs):
            raise NonFiniteError("the log-probabilities are not finite")
        if not math.isfinite(gradient_sum):
            raise NonFiniteError("the gradient is not finite")
        if gradient_P is not None:
            self.adapter.accumulate(gradient_P)
        return ForwardBackwardResult(logprobs=self._split_logprobs(), metrics=self._metrics())

    def _split_logprobs(self) -> tuple[Float32Array, ...]:
        rows_NK, start, split = np.concatenate(self.logprobs), 0, []
        for datum in self.request.data:
            stop = start + len(datum.tokens)
            part = rows_NK[start:stop]
            is_flat = datum.target_tokens.ndim == 1
            split.append(part[:, 0].copy() if is_flat else part[:, : datum.target_tokens.shape[1]].copy())
            start = stop
        return tuple(split)

    def _metrics(self) -> dict[str, float]:
        if all("weights" in block.inputs for block in self.blocks):
            weight = sum(
                float(np.abs(block.inputs["weights"]).sum(dtype=np.float64)) for block in self.blocks
            )
        else:
            weight = float(sum(int(block.trained_N.sum()) for block in self.blocks))
        num_tokens = sum(block.num_rows for block in self.blocks)
        return {"loss:sum": self.loss_sum, "tokens:sum": float(num_tokens), "loss_weight:sum": weight}


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
        num_targets = max(_num_targets(datum) for datum in request.data)
        blocks = [_build_block([request.data[i] for i in cut], loss, num_targets) for cut in cuts]
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
            queue.sort(
                key=lambda entry: entry[1].adapter.spec.rank
            )  # adapters of one layout can share products
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


def check_datum(datum: Datum, index: int, *, vocab_size: int, max_context: int) -> None:
    """Check shapes and token ids of one datum.

    Raises:
        DatumError: names the datum by its index and says what is wrong with it.
    """
    tokens, targets = datum.tokens, datum.target_tokens
    if tokens.ndim != 1 or not 1 <= len(tokens) <= max_context:
        raise DatumError(f"datum {index}: tokens of shape {tokens.shape}; 1 to {max_context} tokens fit")
    if targets.ndim not in (1, 2) or len(targets) != len(tokens) or targets.size == 0:
        raise DatumError(
            f"datum {index}: target_tokens of shape {targets.shape} do not suit {len(tokens)} tokens"
        )
    for name, ids in (("tokens", tokens), ("target_tokens", targets)):
        if ids.min() < 0 or ids.max() >= vocab_size:
            odd = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise DatumError(f"datum {index}: {name} holds {odd}, outside the vocabulary 0..{vocab_size - 1}")


def _num_targets(datum: Datum) -> int:
    return 1 if datum.target_tokens.ndim == 1 else int(datum.target_tokens.shape[1])


def _build_block(data: Sequence[Datum], loss: BoundLoss, num_targets: int) -> Block:
    """Return one block; raises DatumError or LossFunctionError where a datum's tensors do not fit."""
    targets, trained, columns = [], [], []
    for datum in data:
        if datum.target_tokens.ndim == 2 and loss.name != "cross_entropy":
            raise DatumError(f"{loss.name} takes one target per position, not {datum.target_tokens.shape}")
        inputs = loss.select_inputs(datum.inputs)
        for name, values in inputs.items():
            if values.shape != datum.target_tokens.shape:
                raise DatumError(
                    f"{name} has shape {values.shape}, target_tokens have {datum.target_tokens.shape}"
                )
        wide = {name: _widen(values, num_targets) for name, values in inputs.items()}
        shape = (len(datum.tokens), num_targets)
        targets.append(_widen(datum.target_tokens, num_targets))
        trained.append(loss.trained(wide, shape).any(axis=1))
        columns.append(wide)
    return Block(
        tokens=tuple(datum.tokens for datum in data),
        targets_NK=np.concatenate(targets).astype(np.int64, copy=False),
        inputs={
            name: np.concatenate([column[name] for column in columns]).astype(np.float32, copy=False)
            for name in columns[0]
        },
        trained_N=np.concatenate(trained),
    )


def _widen(values: npt.NDArray[Scalar], num_targets: int) -> npt.NDArray[Scalar]:
    """Return (N,) or (N, k) values as (N, num_targets), with zeros in the new columns."""
    columns = values.reshape(len(values), -1)
    missing = num_targets - columns.shape[1]
    return np.pad(columns, ((0, 0), (0, missing))) if missing else columns


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
