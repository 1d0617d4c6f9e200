"""A held run inside the worker: its engine, the operations waiting in memory, and how its training goes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, TypeAlias

from gpuworker import suspicion
from gpuworker.engine.adapters import AdapterState
from gpuworker.engine.engine import Engine
from gpuworker.engine.types import (
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
    OptimStepResult,
)
from runs.services.claims import HeldRun, TakenOperation


@dataclass(frozen=True, kw_only=True)
class Create:
    """Make the adapter, fresh or from a checkpoint."""

    load: Load | None


@dataclass(frozen=True, kw_only=True)
class Load:
    """Replace the adapter's weights (and Adam moments) by a checkpoint's."""

    directory: str
    path: str
    optimizer: bool


@dataclass(frozen=True, kw_only=True)
class Save:
    """Write a checkpoint; `sampling_session_seq` asks for a sampling session on it instead of a name."""

    kind: str
    name: str
    overwrite: bool = False
    ttl_seconds: int | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    sampling_session_seq: int | None = None

    @property
    def is_ephemeral(self) -> bool:
        """Whether the checkpoint only feeds a sampling session."""
        return self.sampling_session_seq is not None


@dataclass(frozen=True, kw_only=True)
class Record:
    """Enter values that were measured outside the engine as metrics of a step."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Unload:
    """Let the adapter go; the run is closed."""


@dataclass(frozen=True)
class Consumed:
    """A seq that needs nothing done: its request was refused, or never came."""


@dataclass(frozen=True)
class Unreadable:
    """An operation whose payload could not be read back; it fails alone."""

    error: str


Request: TypeAlias = (
    ForwardBackward | OptimStep | Create | Load | Save | Record | Unload | Consumed | Unreadable
)


@dataclass(frozen=True, kw_only=True)
class PreparedOperation:
    """An operation decoded for the engine. `taken` is None for a seq that never came."""

    seq: int
    request: Request
    taken: TakenOperation | None

    @property
    def num_tokens(self) -> int:
        """Input tokens, for the cycle's budget."""
        return self.taken.num_tokens if self.taken else 0

    @property
    def client_gap_s(self) -> float:
        """How long nothing of the run was to be done before it was asked for."""
        return self.taken.client_gap_s if self.taken else 0.0

    @property
    def is_suspicious(self) -> bool:
        """Whether it is to be tried alone."""
        return self.taken is not None and suspicion.is_suspicious(self.taken)

    @property
    def is_poison(self) -> bool:
        """Whether it is to be tried no more."""
        return self.taken is not None and suspicion.is_poison(self.taken)


# What fails just now is tried again after such a time, doubled each time.
FIRST_PUT_OFF_S: Final = 1.0
LONGEST_PUT_OFF_S: Final = 30.0


@dataclass
class PutOff:
    """What is tried again later because it fails just now; `reason` is what people are told meanwhile."""

    pause_s: float = 0.0
    due_at: float = 0.0
    reason: str = ""

    @property
    def is_due(self) -> bool:
        """Whether it may be tried now."""
        return time.monotonic() >= self.due_at

    def again(self) -> None:
        """Let some time pass before it is tried again, more each time."""
        self.pause_s = min(max(2 * self.pause_s, FIRST_PUT_OFF_S), LONGEST_PUT_OFF_S)
        self.due_at = time.monotonic() + self.pause_s


@dataclass
class Tally:
    """What was trained since the last optimizer step; becomes that step's metrics.

    `client_gap_s` is how long there was nothing of the run to do: no operation, and no sample of its weights, was
    waiting or being worked on.
    """

    loss_sum: float = 0.0
    loss_weight: float = 0.0
    num_tokens: int = 0
    compute_s: float = 0.0
    queue_wait_s: float = 0.0
    client_gap_s: float = 0.0
    last_step_at: float = field(default_factory=time.monotonic)

    def add(self, result: ForwardBackwardResult, *, compute_s: float, waited_s: float) -> None:
        """Count one forward_backward."""
        self.loss_sum += result.metrics["loss:sum"]
        self.loss_weight += result.metrics["loss_weight:sum"]
        self.num_tokens += int(result.metrics["tokens:sum"])
        self.compute_s += compute_s
        self.queue_wait_s = max(self.queue_wait_s, waited_s)

    def drop_passes(self) -> None:
        """Forget what was trained: its gradient is gone without a step."""
        self.loss_sum = self.loss_weight = 0.0
        self.num_tokens = 0

    def close(self, result: OptimStepResult, learning_rate: float, *, has_client: bool) -> dict[str, float]:
        """Return the metrics of the step that ends here and start the next one; without a client nobody waits for it."""
        now = time.monotonic()
        elapsed_s = max(now - self.last_step_at, 1e-9)
        metrics = {"learning_rate": learning_rate, "grad_norm": result.grad_norm}
        if self.num_tokens:
            metrics |= {
                "loss": self.loss_sum / self.loss_weight if self.loss_weight else self.loss_sum,
                "loss_sum": self.loss_sum,
                "tokens": float(self.num_tokens),
                "tokens_per_s": self.num_tokens / elapsed_s,
                "step_time_s": self.compute_s,
                "queue_wait_s": self.queue_wait_s,
            }
            if has_client:
                metrics["client_gap_s"] = self.client_gap_s
        self.loss_sum = self.loss_weight = self.compute_s = self.queue_wait_s = self.client_gap_s = 0.0
        self.num_tokens = 0
        self.last_step_at = now
        return metrics


class Seat:
    """One run held by this worker.

    Three threads meet here: intake appends to `queue`, compute takes from it, the committer sets
    `is_lost` when another worker owns the run by now. Intake sets `is_leaving`
    when the run is to go to another worker, or anywhere but here. `replay_cost_s` is the computing since the last
    snapshot, `snapshot_cost_s` what keeping that took (without end until it is kept). `unwritten` is the state of a
    shelved run that the storage did not take. `failure` says why nothing can be applied any more. `restoring` is
    compute's, `reading` intake's: what of the run fails just now.
    """

    def __init__(self, run: HeldRun, engine: Engine) -> None:
        self.run = run
        self.engine = engine
        self.adapter_id = f"run-{run.pk}"
        self.queue: deque[PreparedOperation] = deque()
        self.taken_seq = run.applied_seq
        self.applied_seq = run.applied_seq
        self.committed_seq = run.applied_seq
        self.snapshot_seq = -1
        self.snapshot_directory = ""
        self.replay_cost_s = 0.0
        self.snapshot_cost_s = 0.0
        self.unwritten: AdapterState | None = None
        self.saved_names: dict[tuple[str, str], int] = {}
        self.step = run.step
        self.tally = Tally()
        self.is_restored = False
        self.is_shelved = False
        self.restored_at = 0.0
        self.restoring = PutOff()
        self.reading = PutOff()
        self.may_have_more = False
        self.is_lost = False
        self.is_leaving = False
        self.is_suspect = False
        self.is_closed = False
        self.failure = ""
        self.claimed_at = self.last_used_at = time.monotonic()

    @property
    def spec(self) -> LoraSpec:
        """What the run's adapter is like."""
        run = self.run
        return LoraSpec(
            rank=run.lora_rank,
            alpha=run.lora_alpha,
            seed=run.lora_seed,
            train_attn=run.train_attn,
            train_mlp=run.train_mlp,
            train_unembed=run.train_unembed,
        )

    @property
    def takes_room(self) -> bool:
        """Whether it has an adapter in memory or is about to make one."""
        return self.is_restored and (self.applied_seq < 0 or self.engine.has_adapter(self.adapter_id))

    @cached_property
    def num_bytes(self) -> int:
        """What the adapter takes in memory."""
        return self.engine.adapter_bytes(self.spec)

    @property
    def has_work(self) -> bool:
        """Whether an operation waits that may be tried now."""
        return bool(self.queue) and self.restoring.is_due

    @property
    def may_be_filled(self) -> bool:
        """Whether further operations may be decoded for it, as far as it depends on the run."""
        is_stuck = bool(self.queue) and self.restoring.pause_s > 0
        return self.reading.is_due and not (self.is_lost or self.is_leaving or is_stuck)

    @property
    def waiting_tokens(self) -> int:
        """Input tokens of the operations that wait in memory."""
        return sum(operation.num_tokens for operation in list(self.queue))

    def note_saved(self, save: Save, seq: int) -> None:
        """Remember a name that is taken until its save is committed; a row tells from then on."""
        self.saved_names = {name: at for name, at in self.saved_names.items() if at > self.committed_seq}
        self.saved_names[save.kind, save.name] = seq

    def advance(self, operation: PreparedOperation) -> None:
        """Take the next operation, which is applied, from the queue."""
        popped = self.queue.popleft()
        assert popped is operation
        self.applied_seq = operation.seq
        has_closed_tally = isinstance(operation.request, OptimStep)  # its own gap included
        if not has_closed_tally:
            self.tally.client_gap_s += operation.client_gap_s

    @property
    def head(self) -> PreparedOperation | None:
        """The next operation to apply."""
        return self.queue[0] if self.queue else None
