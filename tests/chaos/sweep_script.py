"""The reference scenario: what one client does over HTTP, and notes of everything it was told.

Two runs, the second a fork of the first; every kind of operation; what may fail for want of a disk (a save, a
load, a sample) is tried again, as a person would, and both outcomes are noted.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from tests.chaos.chain import Example
from tests.chaos.client import Client, ClientError, sample_submission, submission
from tests.chaos.engine import MODEL, RANK
from tests.chaos.scripts import Op

LORA_SEED: Final = 4711
KEPT, OVERWRITTEN, SAMPLER, FINAL = "kept", "again", "voice", "final"
_PATIENCE_S: Final = 20.0
_PAUSE_S: Final = 0.05
Made = TypeVar("Made")


@dataclass(kw_only=True)
class Note:
    """One acknowledged operation and what its client was answered; a sample has no seq of the run's.

    The `op` of a sample is the save of its weights, where that was made for it alone.
    """

    kind: str
    request_id: str
    seq: int = -1
    op: Op | None = None
    answer: str = ""
    error: str = ""
    category: str = ""


@dataclass(kw_only=True)
class RunNotes:
    """What the client knows of one run; a fork names the run whose kept weights it began with."""

    model_id: str
    parent: str = ""
    notes: list[Note] = field(default_factory=list)

    @property
    def next_seq(self) -> int:
        """The seq after the last."""
        return self.notes[-1].seq + 1 if self.notes else 0


@dataclass(kw_only=True)
class Notes:
    """Everything the client knows at its end."""

    runs: list[RunNotes] = field(default_factory=list)
    samples: list[Note] = field(default_factory=list)
    exceptions: list[str] = field(default_factory=list)


def fb(size: int) -> Op:
    """Return a forward_backward with one example; from about 60 tokens on its payload is kept in a file."""
    return Op(kind="forward_backward", examples=(_example(size, size),))


def forward(size: int) -> Op:
    """Return a forward."""
    return Op(kind="forward", examples=(_example(size, 7),))


def step(rate: float) -> Op:
    """Return an optimizer step."""
    return Op(kind="optim_step", learning_rate=rate / 4096)


def _itself(note: Any) -> Note:
    made: Note = note
    return made


class Scripted:
    """The client; `halfway` is called between its two halves."""

    def __init__(self, port: int, key: str) -> None:
        self._client = Client(port, key)
        self._session = ""
        self.notes = Notes()

    def work(self, halfway: Callable[[], None]) -> None:
        """Do everything; what an SDK would raise is noted."""
        try:
            first, fork = self._first_half()
            halfway()
            self._second_half(first, fork)
        except Exception:  # noqa: BLE001 - whatever it was, a user would have seen it
            self.notes.exceptions.append(traceback.format_exc()[-1500:])

    def _first_half(self) -> tuple[RunNotes, RunNotes]:
        self._session = self._client.call("create_session", {"tags": ["sweep"], "sdk_version": "0.38.0"})[
            "session_id"
        ]
        first = self._created()
        self._all(first, fb(4), step(3), fb(100), fb(5), step(5))
        self._until_done(lambda: self._one(first, Op(kind="save", name=KEPT)))
        self._all(first, fb(6), step(7))
        self._until_done(lambda: self._one(first, Op(kind="save_for_sampler", name=SAMPLER)))
        self._until_done(lambda: self._one(first, Op(kind="load", name=KEPT, optimizer=True)))
        self._all(first, fb(7), fb(8))
        fork = self._forked(first)
        self._all(fork, fb(5), step(2))
        self._sampled(first)
        self._current_sampled(first)
        return first, fork

    def _second_half(self, first: RunNotes, fork: RunNotes) -> None:
        self._all(first, step(9), forward(5))
        for _ in range(2):
            self._until_done(lambda: self._one(first, Op(kind="save", name=OVERWRITTEN)))
        for run in (first, fork):
            self._until_done(lambda run=run: self._one(run, Op(kind="save", name=FINAL)))  # type: ignore[misc]

    # Calls --------------------------------------------------------------------------------------

    def _created(self) -> RunNotes:
        config = {"rank": RANK, "seed": LORA_SEED}
        body = {"session_id": self._session, "model_seq_id": 0, "base_model": MODEL, "lora_config": config}
        run, note = self._begun("create_model", body, "create")
        if note.error:
            raise ClientError(f"the run could not be made: {note.error}")
        return run

    def _forked(self, parent: RunNotes) -> RunNotes:
        path = f"tinker://{parent.model_id}/weights/{KEPT}"
        number = 0

        def fork() -> tuple[RunNotes, Note]:
            nonlocal number
            number += 1
            body = {"session_id": self._session, "model_seq_id": number, "path": path, "optimizer": False}
            run, note = self._begun("load_weights", body, "fork")
            run.parent = parent.model_id
            return run, note

        return self._until_done(fork, of=lambda made: made[1])[0]

    def _begun(self, path: str, body: dict[str, Any], kind: str) -> tuple[RunNotes, Note]:
        taken = self._client.call(path, body)
        run = RunNotes(model_id=taken["model_id"])
        self.notes.runs.append(run)
        note = Note(kind=kind, seq=0, request_id=taken["request_id"])
        run.notes.append(note)
        return run, self._awaited(note)

    def _sampled(self, run: RunNotes) -> None:
        body = {"session_id": self._session, "sampling_session_seq_id": 0}
        body["model_path"] = f"tinker://{run.model_id}/sampler_weights/{SAMPLER}"
        opened = self._client.call("create_sampling_session", body)["sampling_session_id"]
        number = 0

        def sample() -> Note:
            nonlocal number
            number += 1
            return self._sample(opened, number)

        self._until_done(sample)

    def _current_sampled(self, run: RunNotes) -> None:
        """Sample from the weights as they are, saved for that alone; where one fails, both are done again."""
        number = 0

        def sample() -> Note:
            nonlocal number
            number += 1
            save = self._one(run, Op(kind="save_for_session", name=str(number)))
            return save if save.error else self._sample(f"{self._session}:sample:{number}", 1, of=save.op)

        self._until_done(sample)

    def _sample(self, sampling_session: str, seq: int, *, of: Op | None = None) -> Note:
        taken = self._client.call("asample", sample_submission(sampling_session, seq))
        self.notes.samples.append(Note(kind="sample", op=of, request_id=taken["request_id"]))
        return self._awaited(self.notes.samples[-1])

    def _all(self, run: RunNotes, *ops: Op) -> None:
        """Send operations ahead, and then await them."""
        for note in [self._sent(run, op) for op in ops]:
            self._awaited(note)

    def _one(self, run: RunNotes, op: Op) -> Note:
        return self._awaited(self._sent(run, op))

    def _sent(self, run: RunNotes, op: Op) -> Note:
        path, body = submission(op, run.model_id, run.next_seq)
        if op.name == OVERWRITTEN:
            body["overwrite"] = True
        taken = self._client.call(path, body)
        note = Note(kind=op.kind, op=op, seq=run.next_seq, request_id=taken["request_id"])
        run.notes.append(note)
        return note

    def _awaited(self, note: Note) -> Note:
        answer = self._client.result(note.request_id)
        if answer.startswith(b'{"error"'):
            failure = json.loads(answer)
            note.error, note.category = failure["error"], failure["category"]
        note.answer = answer.hex()
        return note

    def _until_done(self, act: Callable[[], Made], of: Callable[[Made], Note] = _itself) -> Made:
        """Do what may fail until it does not; each try is noted."""
        until = time.monotonic() + _PATIENCE_S
        while True:
            made = act()
            if not of(made).error:
                return made
            if time.monotonic() > until:
                raise ClientError(f"{of(made).kind} fails again and again: {of(made).error}")
            time.sleep(_PAUSE_S)


def write(notes: Notes, target: Path) -> None:
    """Keep the notes."""
    draft = target.with_suffix(".draft")
    draft.write_text(json.dumps(asdict(notes)))
    draft.rename(target)


def read(source: Path) -> Notes:
    """Read them back."""
    content = json.loads(source.read_text())
    runs = [RunNotes(**{**run, "notes": _notes(run["notes"])}) for run in content["runs"]]
    return Notes(runs=runs, samples=_notes(content["samples"]), exceptions=content["exceptions"])


def _notes(rows: Sequence[dict[str, Any]]) -> list[Note]:
    return [Note(**{**row, "op": _op(row["op"])}) for row in rows]


def _op(row: dict[str, Any] | None) -> Op | None:
    if row is None:
        return None
    examples = tuple(
        Example(**{name: tuple(values) for name, values in one.items()}) for one in row["examples"]
    )
    return Op(**{**row, "examples": examples})


def _example(size: int, seed: int) -> Example:
    return Example(
        tokens=tuple((seed * 31 + index * 7) % 200 for index in range(size)),
        targets=tuple((seed * 17 + index * 5) % 200 for index in range(size)),
        weights=tuple((0.25, 0.5, 1.0)[index % 3] for index in range(size)),
    )
