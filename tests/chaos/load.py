"""One client process: a thread for each of its runs, submitting ahead and awaiting later, until it is told to end.

`python -m tests.chaos.load` reads its orders as JSON from the command line and writes a ledger of everything that
was acknowledged. It ends when the stop file appears, or after the given number of operations of each run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.chaos.client import Client, ClientError, sample_submission, submission
from tests.chaos.scripts import FINAL_SAVE, Op, lora_seed, script

_PRESENCE_S: Final = 0.2


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What one client process is to do. `lengths` of 0 mean: until the stop file appears."""

    port: int
    key: str
    seed: int
    base_model: str
    rank: int
    runs: list[int]
    lengths: list[int]
    stop_file: str
    ledger_file: str
    max_ahead: int = 24


@dataclass(kw_only=True)
class Entry:
    """One acknowledged operation and what its client was answered; the seq of a sample is that of its weights."""

    seq: int
    request_id: str
    answer: str = ""
    error: str = ""


@dataclass(kw_only=True)
class RunLedger:
    """Everything that one run's client knows."""

    run: int
    model_id: str = ""
    entries: list[Entry] = field(default_factory=list)
    samples: list[Entry] = field(default_factory=list)
    exceptions: list[str] = field(default_factory=list)
    num_resent: int = 0
    num_instant_errors: int = 0


class RunClient:
    """The client of one run."""

    def __init__(self, orders: Orders, run: int, length: int) -> None:
        self._orders = orders
        self._length = length
        self._client = Client(orders.port, orders.key)
        self._rng = random.Random(f"client {orders.seed}/{run}")
        self._pending: deque[Entry] = deque()
        self._saves: dict[str, Entry] = {}
        self._next_seq = 1
        self.ledger = RunLedger(run=run)

    def work(self) -> None:
        """Do the whole script; what an SDK would raise is noted."""
        try:
            self._create()
            operations = script(self._orders.seed, self.ledger.run)
            while batch := self._next_batch(operations):
                self._submit(batch)
                while len(self._pending) > self._orders.max_ahead:
                    self._await_oldest()
            self._submit([FINAL_SAVE])
            while self._pending:
                self._await_oldest()
        except Exception:  # noqa: BLE001 - whatever it was, a user would have seen it
            self.ledger.exceptions.append(traceback.format_exc()[-1500:])
        self.ledger.num_instant_errors = self._client.num_instant_errors

    def _create(self) -> None:
        session = self._client.call("create_session", {"tags": ["chaos"], "sdk_version": "0.38.0"})
        body = {
            "session_id": session["session_id"],
            "model_seq_id": 0,
            "base_model": self._orders.base_model,
            "lora_config": {
                "rank": self._orders.rank,
                "seed": lora_seed(self._orders.seed, self.ledger.run),
            },
        }
        taken = self._client.call("create_model", body)
        self.ledger.model_id = taken["model_id"]
        self._note(0, taken)
        self._await_oldest()

    def _next_batch(self, operations: Iterator[Op]) -> list[Op]:
        """Return what is sent next; a load comes alone, after the save it names."""
        if self._length == 0 and Path(self._orders.stop_file).exists():
            return []
        size = self._rng.randint(1, 12)
        if self._length:
            size = min(size, self._length - (self._next_seq - 1))
        return list(itertools.islice(operations, size))

    def _submit(self, batch: list[Op]) -> None:
        """Send operations, now and then not in their order, now and then twice."""
        numbered = list(enumerate(batch, self._next_seq))
        self._next_seq += len(batch)
        parts: list[list[tuple[int, Op]]] = [[]]
        for seq, op in numbered:
            if op.kind == "load":
                parts += [[(seq, op)], []]
            else:
                parts[-1].append((seq, op))
        for part in filter(None, parts):
            if part[0][1].kind == "load":
                self._await_all()
            if self._rng.random() < 0.2:
                self._rng.shuffle(part)
            for seq, op in part:
                self._send(seq, op)

    def _send(self, seq: int, op: Op) -> None:
        path, body = submission(op, self.ledger.model_id, seq)
        taken = self._client.call(path, body)
        self._note(seq, taken)
        if self._rng.random() < 0.03:
            self.ledger.num_resent += 1
            again = self._client.call(path, body)
            if again["request_id"] != taken["request_id"]:
                raise ClientError(f"seq {seq}: sent twice, taken as {taken} and {again}")

    def _note(self, seq: int, taken: dict[str, Any]) -> None:
        entry = Entry(seq=seq, request_id=taken["request_id"])
        self.ledger.entries.append(entry)
        self._pending.append(entry)

    def _await_all(self) -> None:
        while self._pending:
            self._await_oldest()

    def _await_oldest(self) -> None:
        entry = self._pending.popleft()
        answer = self._client.result(entry.request_id)
        entry.answer = hashlib.sha256(answer).hexdigest()
        if answer.startswith(b'{"error"'):
            entry.error = str(json.loads(answer)["error"])
            self.ledger.exceptions.append(f"seq {entry.seq} failed: {entry.error}")
        elif b'"sampling_session_id":"' in answer:
            self._sample(entry.seq, str(json.loads(answer)["sampling_session_id"]))

    def _sample(self, seq: int, sampling_session: str) -> None:
        """Sample from the weights that an operation has saved for this alone, and await it as any other."""
        taken = self._client.call("asample", sample_submission(sampling_session))
        sample = Entry(seq=seq, request_id=taken["request_id"])
        self.ledger.samples.append(sample)
        self._pending.append(sample)


def main() -> None:
    """Run every client to its end and write the ledger."""
    orders = Orders(**json.loads(sys.argv[1]))
    clients = [
        RunClient(orders, run, length) for run, length in zip(orders.runs, orders.lengths, strict=True)
    ]
    threads = [threading.Thread(target=client.work, daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    driver = os.getppid()
    while any(thread.is_alive() for thread in threads):
        if os.getppid() != driver:
            os._exit(1)
        counted = sum(len(client.ledger.entries) + len(client.ledger.samples) for client in clients)
        _write(Path(orders.ledger_file).with_suffix(".count"), str(counted))
        time.sleep(_PRESENCE_S)
    _write(Path(orders.ledger_file), json.dumps([asdict(client.ledger) for client in clients]))


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.rename(path)


if __name__ == "__main__":
    main()
