"""The oracles of one pass: what the client was told, the log, the files and the server against the hash chain."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from django.core.files.storage import default_storage
from django.db import connection

from gpuworker.engine import checkpoints
from runs import ids
from runs.models import Checkpoint, Metric, Operation, RunEvent, Snapshot, TrainingRun, Worker
from runs.schemas import responses, results
from runs.services import blobs, payload_files, state_folders, workers
from tests.chaos import chain, speaking
from tests.chaos.chain import Chain
from tests.chaos.engine import RANK
from tests.chaos.sweep_processes import Place
from tests.chaos.sweep_script import (
    KEPT,
    LORA_SEED,
    Note,
    Notes,
    RunNotes,
)

if TYPE_CHECKING:
    from tests.chaos.sweep_case import Outcome

# What may fail, cleanly, when the disk fails for a moment, and when it does for good; nothing else may fail at all.
FOR_A_MOMENT: Final = frozenset({"save", "save_for_sampler", "save_for_session", "load", "fork", "sample"})
WITHOUT_DISK: Final = FOR_A_MOMENT | {"forward_backward"}  # of which a large one is read from a file
_TOKENS: Final = "tokens:sum"


def empty_database() -> None:
    """Leave nothing but the user and the key; numbers begin anew, so that each pass gives the same ones."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT string_agg(quote_ident(tablename), ', ') FROM pg_tables WHERE schemaname = 'public'"
            " AND tablename LIKE 'runs_%%' AND NOT starts_with(tablename, 'runs_user') AND tablename != 'runs_apikey'",
        )
        (tables,) = cursor.fetchone()
        cursor.execute(f"TRUNCATE {tables} RESTART IDENTITY CASCADE")
    connection.close()


@dataclass(kw_only=True)
class Expected:
    """What a run should be: each successful operation's answer by seq, its curve, what it saved, its end.

    `frozen` is what samples were drawn from, by the name of the save that was made for them.
    """

    answers: dict[int, bytes] = field(default_factory=dict)
    points: dict[tuple[int, str], float] = field(default_factory=dict)
    saved: dict[tuple[str, str], Chain] = field(default_factory=dict)
    frozen: dict[str, Chain] = field(default_factory=dict)
    num_tokens: int = 0
    state: Chain


def judge(outcome: Outcome, notes: Notes) -> None:
    """Compare everything, and note what is not as it should be."""
    outcome.problems += [f"client: {text}" for text in notes.exceptions]
    outcome.num_ops = sum(len(run.notes) for run in notes.runs) + len(notes.samples)
    kept: dict[str, Chain] = {}
    for run in notes.runs:
        _judge_failures(outcome, run.notes)
        if run.notes[0].error:
            continue  # a fork that could not be made; the client made another
        begin = chain.begin(seed=LORA_SEED, rank=RANK)
        if run.parent:
            begin = chain.loaded(kept[run.parent], optimizer=False)
        expected = _expected(run, begin)
        kept[run.model_id] = expected.saved.get((Checkpoint.Kind.TRAINING, KEPT), begin)
        _judge_run(outcome, run, expected)
        _judge_samples(outcome, notes.samples, expected)
    _judge_failures(outcome, notes.samples)
    connection.close()


def _judge_failures(outcome: Outcome, notes: Sequence[Note]) -> None:
    """Note operations that failed though they must not, and count those that may."""
    fault = outcome.fault
    may_fail: frozenset[str] = frozenset()
    if fault is not None and fault.library == "file":
        may_fail = WITHOUT_DISK if fault.mode == "forever" else FOR_A_MOMENT
    for note in notes:
        if note.error and note.kind in may_fail and note.category == "server":
            outcome.failed_cleanly.append(f"{note.kind}: {note.error}")
        elif note.error:
            outcome.problems.append(f"{note.kind} (seq {note.seq}) failed as {note.category}: {note.error}")


def _expected(run: RunNotes, state: Chain) -> Expected:
    expected = Expected(state=state)
    examples: list[chain.Example] = []
    losses: list[float] = []
    for note in sorted(run.notes, key=lambda one: one.seq):
        if note.error:
            continue
        op, state = note.op, expected.state
        if op is None:
            content = _begun(run, note)
        elif op.kind in ("forward", "forward_backward"):
            expected.state, digest = chain.forward(state, op.examples, backward=op.kind == "forward_backward")
            metrics = chain.metrics(digest, op.examples)
            logprobs = [
                np.array(chain.logprobs(digest, len(one.targets)), dtype=np.float32) for one in op.examples
            ]
            content = results.encode_forward_backward(logprobs, metrics)
            expected.num_tokens += int(metrics[_TOKENS])
            if op.kind == "forward_backward":
                examples += op.examples
                losses.append(metrics["loss:sum"])
        elif op.kind == "optim_step":
            expected.state, norm = chain.optim_step(state, op.learning_rate)
            values = {"grad_norm": norm, "learning_rate": op.learning_rate}
            content = _json(responses.optim_step_result({"step": float(expected.state.step), **values}))
            values |= _of_step(examples, losses)
            expected.points |= {(note.seq, name): value for name, value in values.items()}
            examples, losses = [], []
        elif op.kind == "load":
            expected.state = chain.loaded(
                expected.saved[Checkpoint.Kind.TRAINING, op.name], optimizer=op.optimizer
            )
            path = f"tinker://{run.model_id}/weights/{op.name}"
            content = _json(responses.load_weights_result(path, model_id=run.model_id))
        elif op.kind == "save":
            expected.saved[Checkpoint.Kind.TRAINING, op.name] = state
            content = _json(responses.save_weights_result(f"tinker://{run.model_id}/weights/{op.name}"))
        elif op.kind == "save_for_session":
            expected.saved[Checkpoint.Kind.SAMPLER, f".{note.seq}"] = expected.frozen[op.name] = state
            session = run.model_id.partition(":")[0]
            content = _json(
                responses.ephemeral_sampler_result(ids.sampling_session_id(session, int(op.name)))
            )
        else:
            expected.saved[Checkpoint.Kind.SAMPLER, op.name] = expected.frozen[""] = state
            path = f"tinker://{run.model_id}/sampler_weights/{op.name}"
            content = _json(responses.save_weights_for_sampler_result(path))
        expected.answers[note.seq] = content
    return expected


def _begun(run: RunNotes, note: Note) -> bytes:
    if note.kind == "create":
        return _json(responses.create_model_result(run.model_id))
    path = f"tinker://{run.parent}/weights/{KEPT}"
    return _json(responses.load_weights_result(path, model_id=run.model_id))


def _of_step(examples: Sequence[chain.Example], losses: Sequence[float]) -> dict[str, float]:
    """Return the metrics of a step that are told of the forward_backwards before it."""
    if not losses:
        return {}
    weight = sum(sum(one.weights) for one in examples)
    num_tokens = sum(len(one.tokens) for one in examples)
    return {"loss_sum": sum(losses), "loss": sum(losses) / weight, "tokens": float(num_tokens)}


def _judge_run(outcome: Outcome, run: RunNotes, expected: Expected) -> None:
    row = TrainingRun.objects.filter(public_id=run.model_id).first()
    if row is None:
        outcome.problems.append("a run that was acknowledged is not there")
        return
    rows = {operation.seq: operation for operation in Operation.objects.filter(run=row).order_by("seq")}
    seqs = list(range(run.next_seq))
    if sorted(rows) != seqs or row.applied_seq != run.next_seq - 1:
        outcome.problems.append(f"applied {row.applied_seq} of seqs {sorted(rows)}; the client sent {seqs}")
    for seq, count in Counter(note.seq for note in run.notes).items():
        if count > 1:
            outcome.problems.append(f"seq {seq} was acknowledged {count} times")
    for note in run.notes:
        _judge_answer(outcome, note, rows.get(note.seq), expected.answers.get(note.seq))
    if (row.state, row.error, row.worker_id) != (TrainingRun.State.OPEN, "", None):
        outcome.problems.append(f"the run is {row.state} {row.error!r}, held by {row.worker_id}")
    if (row.step, row.num_tokens) != (expected.state.step, expected.num_tokens):
        told = f"step {row.step}, {row.num_tokens} tokens"
        outcome.problems.append(f"{told}; not {expected.state.step}, {expected.num_tokens}")
    _judge_curve(outcome, row, expected.points)
    _judge_checkpoints(outcome, row, expected.saved)
    for event in RunEvent.objects.filter(run=row, kind="diverged"):
        outcome.problems.append(f"diverged at seq {event.seq}: {event.detail}")


def _judge_answer(outcome: Outcome, note: Note, row: Operation | None, expected: bytes | None) -> None:
    where = f"{note.kind} (seq {note.seq})"
    if row is None or row.request_id != note.request_id:
        outcome.problems.append(f"{where}: acknowledged as {note.request_id}, but that is not in the log")
    elif note.error:
        if (row.state, row.error, row.error_category) != (Operation.State.FAILED, note.error, note.category):
            outcome.problems.append(f"{where}: told {note.error!r}, the log says {row.state} {row.error!r}")
    elif row.result is None or bytes(row.result).hex() != note.answer:
        outcome.problems.append(f"{where}: the client was told something else than the log says")
    elif bytes(row.result) != expected:
        outcome.problems.append(f"{where}: not the answer of an undisturbed run")


def _judge_curve(outcome: Outcome, run: TrainingRun, points: Mapping[tuple[int, str], float]) -> None:
    names = {name for _, name in points}
    found = {
        (metric.seq, metric.name): metric.value for metric in Metric.objects.filter(run=run, name__in=names)
    }
    for key in sorted(found.keys() | points.keys()):
        if found.get(key) != points.get(key):
            outcome.problems.append(f"metric {key}: {found.get(key)}, not {points.get(key)}")


def _judge_checkpoints(outcome: Outcome, run: TrainingRun, saved: Mapping[tuple[str, str], Chain]) -> None:
    rows = {(row.kind, row.name): row for row in Checkpoint.objects.filter(run=run)}
    if rows.keys() != saved.keys():
        outcome.problems.append(f"checkpoints {sorted(rows)}, not {sorted(saved)}")
    for key in rows.keys() & saved.keys():
        held = checkpoints.read(Path(default_storage.path(rows[key].directory)))
        state = saved[key]
        tensors = [(held.weights, state.weights)]
        if held.optimizer is not None:
            tensors += [(held.optimizer.exp_avg, state.average), (held.optimizer.exp_avg_sq, state.square)]
        is_same = all(bytes(int(value) for value in tensor.tolist()) == digest for tensor, digest in tensors)
        if not is_same or held.step != state.step:
            outcome.problems.append(f"checkpoint {key} holds something else than an undisturbed run's")


def _judge_samples(outcome: Outcome, samples: Sequence[Note], expected: Expected) -> None:
    if not expected.frozen:
        return
    rows = {row.request_id: row for row in Operation.objects.filter(sampling_session__isnull=False)}
    if len(rows) != len(samples):
        outcome.problems.append(f"{len(rows)} samples in the log, {len(samples)} acknowledged")
    for note in samples:
        frozen = expected.frozen["" if note.op is None else note.op.name]
        _judge_answer(outcome, note, rows.get(note.request_id), speaking.answer_of(frozen.weights))


# What is left ----------------------------------------------------------------------------------------------------


def judge_leftovers(outcome: Outcome, place: Place, *, when: str) -> None:
    """Note what processes that have ended left behind, after the sweeps that the product does by itself."""
    left = _left_in_database(outcome) + _left_in_storage(place)
    outcome.problems += [f"{when}: {text}" for text in left]
    connection.close()


def _left_in_database(outcome: Outcome) -> list[str]:
    left = []
    num_ended_badly = sum(text.startswith("worker") and text != "worker 0" for text in outcome.exits)
    num_open = Worker.objects.filter(stopped_at=None).count()
    if num_open > num_ended_badly:
        left.append(f"{num_open} workers without an end, {num_ended_badly} were ended without one")
    _until_nothing(_OTHERS)
    _bury_all()
    for what, found in (
        ("workers", Worker.objects.filter(stopped_at=None).count()),
        ("runs held", TrainingRun.objects.exclude(worker=None).count()),
        ("operations waiting", Operation.objects.filter(state=Operation.State.QUEUED).count()),
        ("connections", _count(_OTHERS)),
        ("advisory locks", _count(_LOCKS)),
    ):
        if found:
            left.append(f"{found} {what} are left")
    return left


def _bury_all() -> None:
    """Do what the next worker does, without the wait for one that may just be starting or connecting anew."""
    kept = workers.LOCK_GRACE_S, workers.RETURN_GRACE_S
    workers.LOCK_GRACE_S = workers.RETURN_GRACE_S = 0  # type: ignore[misc]
    workers.bury_dead()
    workers.LOCK_GRACE_S, workers.RETURN_GRACE_S = kept  # type: ignore[misc]


_OTHERS: Final = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid != pg_backend_pid()"
    " AND backend_type = 'client backend'"
)
_LOCKS: Final = (
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


def _count(statement: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return int(cursor.fetchone()[0])


def _until_nothing(statement: str) -> None:
    """Wait a moment for the server to notice that processes have ended."""
    for _ in range(200):
        if not _count(statement):
            return
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.01)")


def _left_in_storage(place: Place) -> list[str]:
    """Return files without a row, and rows without files, after housekeeping."""
    for turn in range(state_folders.NUM_TURNS):
        state_folders.delete_orphans(turn=turn)
    blobs.GRACE_S = 0.0  # type: ignore[misc]
    for minute in range(_PAYLOAD_TURNS):
        payload_files.delete_orphans(minute=minute)
    found = {
        str(path.relative_to(place.storage))
        for kind, depth in (("checkpoints", "*/*"), ("snapshots", "*/*"), ("payloads", "*/*"))
        for path in (place.storage / kind).glob(depth)
    }
    named: set[str] = set()
    for rows in (Checkpoint.objects.all(), Snapshot.objects.all()):
        named |= {row.directory for row in rows}
    payloads = Operation.objects.exclude(payload_file="").values_list("payload_file", flat=True)
    named |= set(payloads)
    problems = [f"{name} is left without a row" for name in sorted(found - named)]
    return problems + [f"{name} has a row but is not there" for name in sorted(named - found)]


_PAYLOAD_TURNS: Final = 32


def _json(content: Any) -> bytes:
    return json.dumps(dict(content), separators=(",", ":"), allow_nan=False).encode()
