"""Continuous batching: sequences of many requests and adapters decode together, slot by slot.

Each `step` admits waiting requests, runs one packed batch (whole prompts of the new ones, one
token of the others) and chooses a token for every sequence. Requests join and leave between steps.
Axes: T rows of the batch, S sequences, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from gpuworker.engine.adapters import UNEMBED
from gpuworker.engine.base_model import BaseModel
from gpuworker.engine.batching import pack_rows
from gpuworker.engine.decode_graphs import DecodeGraphs, NewToken, can_record
from gpuworker.engine.decode_stack import kind_of
from gpuworker.engine.exceptions import (
    EngineError,
    NonFiniteError,
    OutOfMemory,
    SamplingError,
)
from gpuworker.engine.kv_cache import CachedAttention, Entry, KVCache
from gpuworker.engine.logprobs import Head
from gpuworker.engine.lora import SampledProduct
from gpuworker.engine.lora_decode import SampledProducts, SampledRows
from gpuworker.engine.memory import available_bytes, is_out_of_memory
from gpuworker.engine.prompt_scores import score_prompt
from gpuworker.engine.sampler_weights import SamplerWeights
from gpuworker.engine.sequences import (
    ActiveRequest,
    Continuation,
    Group,
    check_request,
    new_tokens,
    num_new_tokens,
)
from gpuworker.engine.stop_strings import TextDecoder
from gpuworker.engine.token_choice import Draw, choose
from gpuworker.engine.types import SampleRequest, SampleResult, StopReason

logger = logging.getLogger(__name__)

SampleOutcome: TypeAlias = tuple[str, SampleResult | EngineError]


class Sampler:
    """The decode loop of one base model.

    Args:
        max_slots: sequences that decode together.
        prompt_budget: prompt tokens admitted in one step (at least one request is).
        cache_bytes: room for keys and values.
        grouped: one masked attention call for all new tokens, and decode steps that can be recorded; meant
            for GPUs.
    """

    def __init__(
        self,
        base: BaseModel,
        head: Head,
        *,
        max_slots: int,
        prompt_budget: int,
        cache_bytes: int,
        grouped: bool,
    ) -> None:
        self._base = base
        self._head = head
        self._max_slots = max_slots
        self._prompt_budget = prompt_budget
        self._cache_bytes = cache_bytes
        self._grouped = grouped
        self._decoder = TextDecoder(base.directory)
        # Half precision attention is slower than float32 on a CPU, so is converting at each step.
        self._cache = KVCache(
            device=base.device, dtype=base.dtype if base.device.type == "cuda" else torch.float32
        )
        self._graphs = (
            DecodeGraphs(base, head, self._cache, max_bytes=cache_bytes // 4)
            if grouped and can_record(base)
            else None
        )
        self.weights = SamplerWeights(base)
        self._actives: dict[str, ActiveRequest] = {}
        self._waiting: deque[ActiveRequest] = deque()
        self._running: list[Continuation] = []
        self._num_stuck = max_slots  # pools are not moved while so many run: there was no memory for it

    @property
    def num_pending(self) -> int:
        """Return the number of requests that are not finished."""
        return len(self._actives)

    def submit(self, request: SampleRequest) -> None:
        """Queue a request with the weights its sampler has now.

        Raises:
            SamplingError: the model cannot serve it, or its id is already in use.
            AdapterNotLoaded: the sampler is unknown.
            OutOfMemory: one sample of it takes more than the host has.
        """
        if request.request_id in self._actives:
            raise SamplingError(f"request {request.request_id} is already being sampled")
        order, weights = 0, None
        if request.sampler_id is not None:
            order, weights = self.weights.get(request.sampler_id)
        base = self._base
        check_request(request, vocab_size=base.vocab_size, max_context=base.max_context)
        self._decoder.check(request.params.stop_strings)
        active = ActiveRequest(
            request, weights, order=order, end_tokens=base.end_tokens, max_context=base.max_context
        )
        self._check_memory(active)
        self._actives[request.request_id] = active
        self._waiting.append(active)

    @property
    def num_wanted(self) -> int:
        """Return the slots in use with those that requests want of which nothing has begun."""
        return len(self._running) + sum(
            active.num_unbegun for active in self._waiting if not active.num_begun
        )

    @property
    def has_left_out(self) -> bool:
        """Return whether the last step had no slot for some request."""
        return any(active.was_left_out and not active.num_begun for active in self._waiting)

    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its slots; return whether it was there."""
        active = self._actives.pop(request_id, None)
        if active is None:
            return False
        self._waiting = deque(a for a in self._waiting if a is not active)
        self._running = [c for c in self._running if c.active is not active]
        return True

    def tokens_of(self, request_id: str, *, start: int) -> list[int]:
        """Return the tokens from a position on that a request's first sample has so far."""
        for continuation in self._running:
            if continuation.active.request.request_id == request_id and continuation.sample == 0:
                return continuation.tokens[start:]
        return []

    @torch.inference_mode()
    def step(self) -> list[SampleOutcome]:
        """Advance every running sequence by one token; return the requests that ended.

        Never raises for a single request: where memory for another one's slot is missing, that one waits; any other
        lack of memory ends all running ones with OutOfMemory.
        """
        groups = self._admit()
        if not groups:
            return []
        try:
            return self._advance(groups)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed = {c.active.request.request_id for c in self._running}
            for request_id in failed:
                self.cancel(request_id)
            self._release()
            return [(request_id, OutOfMemory(f"no room to sample: {error}")) for request_id in failed]

    def _admit(self) -> list[Group]:
        """Give slots to waiting requests and return all groups of this step, by adapter.

        A prompt that several of them share goes through the model once. Who got slots and wants more waits for them
        behind the others.
        """
        if not self._running and not self._is_worth_keeping():
            self._release()
        groups: list[Group] = [[c] for c in self._running]
        budget = self._prompt_budget
        by_prompt: dict[tuple[int, bytes], Group] = {}
        while self._waiting:
            active = self._waiting[0]
            key = (id(active.weights), active.request.prompt.tobytes())
            new = self._begin(active) if budget > 0 or key in by_prompt else []
            if not new:
                break
            if key in by_prompt:
                by_prompt[key] += new
            else:
                budget -= len(active.request.prompt)
                by_prompt[key] = new
            self._running += new
            self._waiting.popleft()
            if active.num_unbegun > 0:
                self._waiting.append(active)
        for active in self._waiting:
            active.was_left_out = True
        groups += by_prompt.values()
        return sorted(groups, key=lambda group: _place(group[0].active))

    def _is_worth_keeping(self) -> bool:
        """Return whether an unused cache stays: where recorded steps depend on it, up to half of its room."""
        cache = self._cache
        return self._graphs is not None and 2 * cache.num_slots * cache.num_positions <= self._max_positions

    def release_unused(self) -> None:
        """Give back what is kept for later requests; nothing while some are running."""
        if not self._running:
            self._release()

    def _release(self) -> None:
        self._cache.release()
        if self._graphs is not None:
            self._graphs.release()
        self.weights.release_unused()

    def _begin(self, active: ActiveRequest) -> Group:
        """Return as many new continuations as slots and cache allow, possibly none."""
        num_running, num_positions = len(self._running), active.num_positions
        wanted = min(num_running + active.num_unbegun, self._max_slots)
        if self._cache.num_fitting(num_positions) < wanted and num_running < self._num_stuck:
            self._make_room(wanted, num_positions)
        used = {c.slot for c in self._running}
        free = [slot for slot in range(self._cache.num_fitting(num_positions)) if slot not in used]
        first = active.num_begun
        slots = free[: wanted - num_running]
        active.num_begun += len(slots)
        return [Continuation(active, sample=first + i, slot=slot) for i, slot in enumerate(slots)]

    def _make_room(self, num_slots: int, num_positions: int) -> None:
        """Move to pools in which more sequences of so many positions have a slot, as far as the cache may grow.

        Alone a sequence may always try: a real lack of memory is reported by torch.
        """
        if not self._running:
            self._release()
        longest = max([num_positions, *(c.active.num_positions for c in self._running)])
        size = self._cache.size_for(num_slots, longest, max_positions=self._max_positions)
        if size[0] > max(self._cache.num_fitting(num_positions), len(self._running)):
            self._move(size)

    def _move(self, size: tuple[int, int]) -> None:
        """Move what runs to the beginning of other pools; without memory for both the next try is with fewer."""
        self._num_stuck = self._max_slots
        try:
            self._cache.resize(*size, kept=[c.slot for c in self._running])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning(
                "requests wait, as there is no memory for %s slots of %s positions: %s", *size, error
            )
            self._num_stuck = len(self._running)
            return
        for slot, continuation in enumerate(self._running):
            continuation.slot = slot

    def _check_memory(self, active: ActiveRequest) -> None:
        """Refuse what would end the process: a host gives out memory that it does not have."""
        num_bytes = active.num_positions * self._base.cache_bytes_per_position(self._cache.dtype)
        is_told_by_torch = self._base.device.type != "cpu" or not self._base.group.is_alone
        if is_told_by_torch or num_bytes <= self._cache_bytes:
            return
        free = available_bytes()
        if num_bytes > free:
            raise OutOfMemory(
                f"{active.num_positions} positions, of the prompt and max_tokens together, take {num_bytes >> 20} MiB "
                f"of keys and values; {free >> 20} MiB are free"
            )

    @property
    def _max_positions(self) -> int:
        """The positions that the cache has room for, in all slots together."""
        return self._cache_bytes // self._base.cache_bytes_per_position(self._cache.dtype)

    def _advance(self, groups: list[Group]) -> list[SampleOutcome]:
        if self._graphs is not None and all(group[0].tokens for group in groups):
            continuations = [group[0] for group in groups]
            rows = [NewToken(c.tokens[-1], c.num_cached, c.slot, c.active.weights) for c in continuations]
            logits_SV = self._graphs.logits(rows)
            if logits_SV is not None:
                return self._decode(logits_SV, continuations)
        hidden_TD, last_rows = self._run_model(groups)
        row = 0
        for group in groups:
            count = num_new_tokens(group)
            for active in dict.fromkeys(continuation.active for continuation in group):
                if active.wants_prompt_scores:
                    active.prompt_scores = score_prompt(
                        self._head,
                        hidden_TD[row : row + count],
                        active.request.prompt,
                        active.weights,
                        top_k=active.request.topk_prompt_logprobs,
                    )
            row += count
            for continuation in group:
                continuation.num_cached += count
        logits_SV = self._logits(hidden_TD, groups, last_rows)
        return self._choose(logits_SV, [c for group in groups for c in group])

    def _decode(self, logits_SV: Tensor, continuations: Sequence[Continuation]) -> list[SampleOutcome]:
        """Take the logits after the newest tokens of all running sequences."""
        for continuation in continuations:
            continuation.num_cached += 1
        return self._choose(logits_SV, continuations)

    def _run_model(self, groups: list[Group]) -> tuple[Tensor, list[int]]:
        """Return the hidden states and each group's last row; fills the cache of every slot."""
        sequences = [(new_tokens(group), group[0].num_cached) for group in groups]
        rows = pack_rows(sequences, row_step=self.weights.row_step)
        num_rows = len(rows.tokens_T)
        entries = [Entry(g[0].slot, g[0].num_cached, num_new_tokens(g)) for g in groups]
        attend = CachedAttention(self._cache, entries, num_rows, grouped=self._grouped)
        products = self._products(groups, [num_new_tokens(group) for group in groups], num_rows)
        with self._base.routed((), attend, sampled=products):
            hidden_TD = self._base.hidden(rows)
        for leader, *followers in groups:
            if followers:
                slots = [continuation.slot for continuation in followers]
                self._cache.copy(leader.slot, slots, len(leader.active.request.prompt))
        last_rows = np.cumsum([entry.num_rows for entry in entries]) - 1
        return hidden_TD, last_rows.tolist()

    def _logits(self, hidden_TD: Tensor, groups: list[Group], last_rows: list[int]) -> Tensor:
        """Return the next-token logits (S, V) of all continuations, in group order."""
        picked = [row for row, group in zip(last_rows, groups, strict=True) for _ in group]
        num_picked = len(picked)
        picked += [0] * (-num_picked % self.weights.row_step)
        hidden_SD = hidden_TD[torch.tensor(picked, device=hidden_TD.device)]
        logits_SV = self._head.base_logits(hidden_SD)
        products = self._products(groups, [len(group) for group in groups], len(picked))
        products.add(logits_SV, hidden_SD, UNEMBED)
        return self._head.cap(logits_SV[:num_picked])

    def _products(self, groups: list[Group], counts: list[int], num_rows: int) -> SampledProduct:
        """Return how to compute a batch in which each group has so many rows."""
        segments, start = [], 0
        counted = zip(groups, counts, strict=True)
        for _, same in groupby(counted, key=lambda pair: id(pair[0][0].active.weights)):
            (first, count), *others = same
            stop = start + count + sum(count for _, count in others)
            weights = first[0].active.weights
            if weights is not None:
                segments.append(SampledRows(start, stop, weights))
            start = stop
        banked = None if self._graphs is None else self._graphs.products(segments, num_rows)
        if banked is not None:
            return banked
        # A prompt's rows go by themselves: its neighbours would be filled up to as many.
        is_decoding = all(group[0].tokens for group in groups)
        stacks = self.weights.stacks if is_decoding else None
        return SampledProducts(segments, num_rows, row_step=self.weights.row_step, stacks=stacks)

    def _choose(self, logits_SV: Tensor, continuations: Sequence[Continuation]) -> list[SampleOutcome]:
        draws = [Draw(c.active.request.params, c.sample, len(c.tokens)) for c in continuations]
        tokens, logprobs = self._base.group.agree(*choose(logits_SV, draws))
        outcomes: list[SampleOutcome] = []
        ended: set[int] = set()
        failed: set[str] = set()
        for continuation, token, logprob in zip(continuations, tokens, logprobs, strict=True):
            active, request_id = continuation.active, continuation.active.request.request_id
            if request_id in failed:
                continue
            if not math.isfinite(logprob):
                self._cache.clear([c.slot for c in self._running if c.active is active])
                self.cancel(request_id)
                failed.add(request_id)
                outcomes.append((request_id, NonFiniteError("the model's log-probabilities are not finite")))
                continue
            reason: StopReason | None = StopReason.LENGTH
            if active.max_new > 0:
                reason = continuation.append(token, logprob, self._decoder)
            if reason is not None:
                active.finish(continuation, reason)
                ended.add(continuation.slot)
            if active.is_done:
                del self._actives[request_id]
                outcomes.append((request_id, active.result()))
        self._running = [c for c in self._running if c.slot not in ended]
        return outcomes


def _place(active: ActiveRequest) -> tuple[int, int, int]:
    """Return where rows of a request stand in a batch: beside those of its weights, and of others that can share a stack.

    All processes of a group must find the same order, so addresses of objects have no part in it.
    """
    if active.weights is None:
        return 0, 0, 0
    rank, modules = kind_of(active.weights)
    return rank, len(modules), active.order
