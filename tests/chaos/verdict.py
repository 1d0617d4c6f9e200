"""Compares what clients were told, what the log says and what lies in storage with what should have come of it all."""

from __future__ import annotations

import hashlib
import itertools
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from django.core.files.storage import default_storage

from gpuworker.engine import checkpoints
from gpuworker.engine.adapters import AdapterState
from runs import ids
from runs.models import Checkpoint, Metric, Operation, RunEvent, TrainingRun
from runs.schemas import responses, results
from tests.chaos import chain, speaking
from tests.chaos.chain import Chain
from tests.chaos.load import RunLedger
from tests.chaos.nemesis import Strike
from tests.chaos.scripts import FINAL_NAME, FINAL_SAVE, Op, lora_seed, script

_SHOWN: Final = 20


@dataclass(kw_only=True)
class Verdict:
    """Counts of what must not be; `problems` tells the first of each in words."""

    num_ops: int = 0
    num_samples: int = 0
    num_lost: int = 0
    num_doubled: int = 0
    num_wrong: int = 0
    num_exceptions: int = 0
    num_diverged: int = 0
    num_recovered: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether every promise was kept."""
        return not (
            self.num_lost or self.num_doubled or self.num_wrong or self.num_exceptions or self.num_diverged
        )

    def note(self, what: str, text: str, count: int = 1) -> None:
        """Count a violation."""
        setattr(self, f"num_{what}", getattr(self, f"num_{what}") + count)
        if len(self.problems) < _SHOWN:
            self.problems.append(f"{what}: {text}")


@dataclass(frozen=True, kw_only=True)
class History:
    """What the log says of one run, in the order of seq: the fence of each answer and when it was given."""

    run_pk: int
    fences: list[int]
    finished_at: list[float]


def of_chains(ledgers: Sequence[RunLedger], seed: int, rank: int) -> tuple[Verdict, list[History]]:
    """Judge a load on the chain engine against the same chain computed here."""
    verdict = Verdict()
    histories = []
    for ledger in ledgers:
        operations = _operations(ledger, seed)
        start = chain.begin(seed=lora_seed(seed, ledger.run), rank=rank)
        answers, last, spoken = _expected(operations, start, ledger.model_id)
        histories.append(_judge(verdict, ledger, operations, answers))
        _judge_samples(verdict, ledger, spoken)
        state = _final_state(ledger)
        if state != replace(
            last, gradient=None
        ):  # a save leaves out what was accumulated since the last step
            verdict.note(
                "wrong", f"run {ledger.run}: the final weights or moments are others than they should be"
            )
    return verdict, histories


def of_adapters(
    ledgers: Sequence[RunLedger], reference: Sequence[RunLedger], seed: int
) -> tuple[Verdict, list[History]]:
    """Judge a load on the torch engine against an undisturbed one with the same operations."""
    verdict = Verdict()
    histories = []
    for ledger, calm in zip(ledgers, reference, strict=True):
        operations = _operations(ledger, seed)
        told = {entry.seq: entry.answer for entry in calm.entries}
        answers = [
            told.get(seq) if op.kind in ("forward", "forward_backward", "optim_step") else None
            for seq, op in enumerate(operations, 1)
        ]
        histories.append(_judge(verdict, ledger, operations, answers))
        _judge_samples(verdict, ledger, {sample.seq: sample.answer for sample in calm.samples})
        if calm.exceptions:
            verdict.note("exceptions", f"the undisturbed run {calm.run}: {calm.exceptions[0]}")
        if _digest(_final_adapter(ledger)) != _digest(_final_adapter(calm)):
            verdict.note("wrong", f"run {ledger.run}: the final adapter is not that of the undisturbed run")
    return verdict, histories


def recovery_s(strikes: Sequence[Strike], histories: Sequence[History]) -> list[float]:
    """Return how long each run that was hit waited for its next owner's first commit."""
    by_run = {history.run_pk: history for history in histories}
    waited = []
    for strike in strikes:
        for holding in strike.hit:
            history = by_run[holding.run_pk]
            index = bisect_right(history.fences, holding.fence)
            if index < len(history.fences):
                waited.append(max(history.finished_at[index] - strike.at, 0.0))
    return waited


# What should have come of it -----------------------------------------------------------------------------------


def _operations(ledger: RunLedger, seed: int) -> list[Op]:
    """Return what the client sent as seq 1, 2, 3, ..."""
    count = max((entry.seq for entry in ledger.entries), default=0)
    return [*itertools.islice(script(seed, ledger.run), max(count - 1, 0)), FINAL_SAVE]


def _expected(
    operations: Sequence[Op], state: Chain, model_id: str
) -> tuple[list[str], Chain, dict[int, str]]:
    """Return the digest of each answer, the state at the end, and the digest of each sample by the seq of its save."""
    answers = []
    saved: dict[str, Chain] = {}
    spoken: dict[int, str] = {}
    for seq, op in enumerate(operations, 1):
        path = f"tinker://{model_id}/weights/{op.name}"
        if op.kind in ("forward", "forward_backward"):
            state, answer = chain.forward(state, op.examples, backward=op.kind == "forward_backward")
            logprobs = [
                np.array(chain.logprobs(answer, len(one.targets)), dtype=np.float32) for one in op.examples
            ]
            answers.append(
                _sha(results.encode_forward_backward(logprobs, chain.metrics(answer, op.examples)))
            )
        elif op.kind == "optim_step":
            state, norm = chain.optim_step(state, op.learning_rate)
            wire = {"step": float(state.step), "grad_norm": norm, "learning_rate": op.learning_rate}
            answers.append(_sha(_json(responses.optim_step_result(wire))))
        elif op.kind == "load":
            state = chain.loaded(saved[op.name], optimizer=op.optimizer)
            answers.append(_sha(_json(responses.load_weights_result(path, model_id=model_id))))
        elif op.kind == "save":
            saved[op.name] = state
            answers.append(_sha(_json(responses.save_weights_result(path))))
        elif op.kind == "save_for_session":
            spoken[seq] = _sha(speaking.answer_of(state.weights))
            opened = ids.sampling_session_id(model_id.partition(":")[0], int(op.name))
            answers.append(_sha(_json(responses.ephemeral_sampler_result(opened))))
        else:
            path = f"tinker://{model_id}/sampler_weights/{op.name}"
            answers.append(_sha(_json(responses.save_weights_for_sampler_result(path))))
    return answers, state, spoken


# What came of it -----------------------------------------------------------------------------------------------


def _judge(
    verdict: Verdict, ledger: RunLedger, operations: Sequence[Op], answers: Sequence[str | None]
) -> History:
    """Count what one run lost, did twice and answered wrongly; returns its history."""
    verdict.num_ops += len(ledger.entries)
    for text in ledger.exceptions:
        verdict.note("exceptions", f"run {ledger.run}: {text}")
    run = TrainingRun.objects.filter(public_id=ledger.model_id).first()
    if run is None:
        verdict.note("lost", f"run {ledger.run} itself", max(len(ledger.entries), 1))
        return History(run_pk=0, fences=[], finished_at=[])
    rows = list(Operation.objects.filter(run=run).order_by("seq").defer("payload"))
    _judge_log(verdict, ledger, run, rows)
    _judge_answers(verdict, ledger, rows, answers)
    _judge_effects(verdict, ledger, run, operations)
    kinds = Counter(RunEvent.objects.filter(run=run).values_list("kind", flat=True))
    verdict.num_recovered += kinds["recovered"]
    for event in RunEvent.objects.filter(run=run, kind="diverged"):
        verdict.note("diverged", f"run {ledger.run}, seq {event.seq}: {event.detail}")
    finished = [row for row in rows if row.finished_at is not None]
    return History(
        run_pk=run.pk,
        fences=[row.fence for row in finished],
        finished_at=[row.finished_at.timestamp() for row in finished if row.finished_at is not None],
    )


def _judge_log(verdict: Verdict, ledger: RunLedger, run: TrainingRun, rows: Sequence[Operation]) -> None:
    """Every seq once, every one answered, by owners that follow each other."""
    for seq, count in Counter(row.seq for row in rows).items():
        if count > 1:
            verdict.note("doubled", f"run {ledger.run}, seq {seq}: {count} rows")
    missing = set(range(run.applied_seq + 1)) - {row.seq for row in rows}
    if missing or any(row.state == Operation.State.QUEUED for row in rows):
        verdict.note("lost", f"run {ledger.run}: seqs {sorted(missing)[:5]} are not in the log, or wait")
    for before, after in itertools.pairwise(row for row in rows if row.state == Operation.State.DONE):
        if after.fence < before.fence:
            verdict.note("wrong", f"run {ledger.run}, seq {after.seq}: committed under a fence that was over")


def _judge_answers(
    verdict: Verdict, ledger: RunLedger, rows: Sequence[Operation], answers: Sequence[str | None]
) -> None:
    """What each client was told is what the log says, and what it should be."""
    by_request = {row.request_id: row for row in rows}
    for seq, count in Counter(entry.seq for entry in ledger.entries).items():
        if count > 1:
            verdict.note("doubled", f"run {ledger.run}, seq {seq}: acknowledged {count} times")
    for entry in ledger.entries:
        row = by_request.get(entry.request_id)
        where = f"run {ledger.run}, seq {entry.seq}"
        if row is None or row.seq != entry.seq or row.result is None or not entry.answer:
            verdict.note("lost", f"{where}: acknowledged, but there is no answer")
            continue
        told = _sha(bytes(row.result))
        expected = answers[entry.seq - 1] if entry.seq else None
        if told != entry.answer:
            verdict.note(
                "wrong", f"{where} ({row.kind}): the client was told something else than the log says"
            )
        elif expected is not None and told != expected:
            verdict.note("wrong", f"{where} ({row.kind}): not the answer of an undisturbed run")


def _judge_samples(verdict: Verdict, ledger: RunLedger, expected: Mapping[int, str]) -> None:
    """Every save for a session was sampled from once, with the answer of the weights that it saved."""
    verdict.num_samples += len(ledger.samples)
    session = ledger.model_id.partition(":")[0]
    rows = Operation.objects.filter(sampling_session__session__public_id=session)
    by_request = {row.request_id: row for row in rows}
    if len(by_request) != len(ledger.samples):
        verdict.note("doubled", f"run {ledger.run}: {len(by_request)} samples of {len(ledger.samples)}")
    if set(expected) != {sample.seq for sample in ledger.samples}:
        verdict.note("lost", f"run {ledger.run}: other weights were sampled from than were saved for it")
    for sample in ledger.samples:
        row = by_request.get(sample.request_id)
        where = f"run {ledger.run}, sample of seq {sample.seq}"
        if row is None or row.result is None or not sample.answer:
            verdict.note("lost", f"{where}: acknowledged, but there is no answer")
        elif not _sha(bytes(row.result)) == sample.answer == expected.get(sample.seq):
            verdict.note("wrong", f"{where}: not the answer of these weights")


def _judge_effects(verdict: Verdict, ledger: RunLedger, run: TrainingRun, operations: Sequence[Op]) -> None:
    """One point of the curve for each step, one checkpoint for each save."""
    kinds = Counter(op.kind for op in operations)
    num_points = Metric.objects.filter(run=run, name="grad_norm").count()
    checkpoints_of = Checkpoint.objects.filter(run=run)
    for found, wanted, what in (
        (num_points, kinds["optim_step"], "points"),
        (checkpoints_of.filter(kind=Checkpoint.Kind.TRAINING).count(), kinds["save"], "checkpoints"),
        (
            checkpoints_of.filter(kind=Checkpoint.Kind.SAMPLER, is_ephemeral=False).count(),
            kinds["save_for_sampler"],
            "samplers",
        ),
    ):
        if found != wanted:
            verdict.note(
                "doubled" if found > wanted else "lost",
                f"run {ledger.run}: {found} {what} of {wanted}",
                abs(found - wanted),
            )


def _final_adapter(ledger: RunLedger) -> AdapterState | None:
    row = Checkpoint.objects.filter(run__public_id=ledger.model_id, name=FINAL_NAME).first()
    return None if row is None else checkpoints.read(Path(default_storage.path(row.directory)))


def _final_state(ledger: RunLedger) -> Chain | None:
    adapter = _final_adapter(ledger)
    if adapter is None or adapter.optimizer is None:
        return None
    digests = (adapter.weights, adapter.optimizer.exp_avg, adapter.optimizer.exp_avg_sq)
    weights, average, square = (bytes(int(value) for value in one.tolist()) for one in digests)
    return Chain(weights=weights, average=average, square=square, step=adapter.step)


def _digest(adapter: AdapterState | None) -> str:
    """Return a SHA-256 over the adapter's step, weights and moments."""
    if adapter is None or adapter.optimizer is None:
        return ""
    parts = (adapter.weights, adapter.optimizer.exp_avg, adapter.optimizer.exp_avg_sq)
    return _sha(b"".join([str(adapter.step).encode(), *(part.numpy().tobytes() for part in parts)]))


def _json(content: Any) -> bytes:
    return json.dumps(dict(content), separators=(",", ":"), allow_nan=False).encode()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def shares(values: Sequence[float]) -> dict[str, float | int]:
    """Return median, 99th percentile and maximum in seconds, and of how many."""
    ordered = sorted(values)
    if not ordered:
        return {"n": 0}
    at = [ordered[min(int(len(ordered) * share), len(ordered) - 1)] for share in (0.5, 0.99)]
    return {"p50": round(at[0], 2), "p99": round(at[1], 2), "max": round(ordered[-1], 2), "n": len(ordered)}
