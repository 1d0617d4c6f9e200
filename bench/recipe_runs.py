"""Runs without code on the benchmark's instance: started over REST, timed by their metrics, their batches read back."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import httpx
import psycopg

from bench.instance import API_KEY, Instance
from mintweb import embedded
from runs.schemas import forward_backward

_TIMEOUT_S: Final = 600
_WORDS: Final = (
    "the",
    "boat",
    "went",
    "over",
    "calm",
    "water",
    "and",
    "saw",
    "a",
    "red",
    "sail",
    "at",
    "dawn",
)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a run did from its first optimizer step to its last.

    Attributes:
        seconds: between the two, by the server's clock.
        busy_s: how long of it the device computed.
        batches: tokens of each sequence of each step in that time, as the worker got them.
    """

    seconds: float
    busy_s: float
    batches: list[list[list[int]]]

    @property
    def num_tokens(self) -> int:
        """Input tokens that were trained on."""
        return sum(len(sequence) - 1 for batch in self.batches for sequence in batch)

    @property
    def padding_ratio(self) -> float:
        """Tokens of the padded rectangles over real tokens."""
        return sum(len(batch) * (max(map(len, batch)) - 1) for batch in self.batches) / self.num_tokens


class Recipes:
    """Starts runs on one dataset of texts of mixed length."""

    def __init__(self, instance: Instance, base_model: str) -> None:
        self._instance = instance
        self._base_model = base_model
        headers = {"Authorization": f"Bearer {API_KEY}"}
        self._http = httpx.Client(base_url=f"{instance.address}/rest/v1", headers=headers, timeout=60)
        self._dataset = self._upload()

    def train(self, num_steps: int, *, seed: int, **settings: Any) -> Finished:
        """Train a run to its end; `settings` come on top of batches of 16 rows without any validation."""
        wanted = {
            "base_model": self._base_model,
            "dataset": self._dataset,
            "num_steps": num_steps,
            "batch_size": 16,
            "seed": seed,
            "validation": {"share": 0},
            "save_every": num_steps,
            **settings,
        }
        run_id = self._call("POST", "/runs", json=wanted)["id"]
        batches = _Batches(self._instance, run_id)
        status = self._until(f"/runs/{run_id}/status", lambda answer: answer["is_over"], batches.keep)
        if status["state"] != "finished":
            raise RuntimeError(f"run {run_id} ended {status['state']}: {status['phase']}")
        values = self._values(run_id)
        ends = [datetime.fromisoformat(one["recorded_at"]) for one in values if one["name"] == "step_time_s"]
        busy = [one["value"] for one in values if one["name"] == "step_time_s"]
        return Finished(
            seconds=(ends[-1] - ends[0]).total_seconds(),
            busy_s=sum(busy[1:]),
            batches=batches.kept(num_steps)[1:],
        )

    def _upload(self) -> str:
        rng = random.Random(0)
        lengths = [int(2 ** rng.uniform(4.5, 8.4)) for _ in range(400)]
        rows = [json.dumps({"text": " ".join(rng.choices(_WORDS, k=length))}) for length in lengths]
        content = {"file": ("texts.jsonl", "\n".join(rows).encode())}
        dataset = self._call("POST", "/datasets", files=content)["id"]
        self._until(f"/datasets/{dataset}", lambda answer: answer["newest"]["state"] == "ready")
        return str(dataset)

    def _until(
        self, path: str, is_done: Callable[[Any], bool], meanwhile: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT_S
        answer: dict[str, Any]
        while not is_done(answer := self._call("GET", path)):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{path} did not come to an end: {answer}")
            meanwhile()
            time.sleep(0.5)
        meanwhile()
        return answer

    def _values(self, run_id: str) -> list[dict[str, Any]]:
        values: list[dict[str, Any]] = []
        page = {"cursor": None, "has_more": True}
        while page["has_more"]:
            cursor = {"cursor": page["cursor"]} if page["cursor"] else {}
            page = self._call("GET", f"/runs/{run_id}/metrics/values", params={"limit": 200, **cursor})
            values += page["items"]
        return values

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        reply = self._http.request(method, path, **arguments)
        if reply.is_error:
            raise RuntimeError(f"{method} {path}: {reply.status_code} {reply.text[:500]}")
        return reply.json()


class _Batches:
    """The batches of a run, read while it trains: what a recovery state covers is no longer kept."""

    _QUERY: Final = """SELECT op.seq, op.payload, op.payload_file FROM runs_operation op
                       JOIN runs_trainingrun run ON run.id = op.run_id
                       WHERE run.public_id = %s AND op.kind = 'forward_backward' AND op.seq > %s
                       ORDER BY op.seq"""

    def __init__(self, instance: Instance, run_id: str) -> None:
        self._storage = instance.data_dir / "storage"
        self._database = embedded.database_url(instance.data_dir)
        self._run_id = run_id
        self._by_seq: dict[int, list[list[int]]] = {}

    def keep(self) -> None:
        """Read the batches that have come since the last call."""
        with psycopg.connect(self._database) as connection:
            newest = max(self._by_seq, default=0)
            for seq, payload, file in connection.execute(self._QUERY, [self._run_id, newest]):
                if payload or file:
                    self._by_seq[seq] = self._sequences(payload, file)

    def kept(self, num_steps: int) -> list[list[list[int]]]:
        """Return the batches of all steps in order."""
        if len(self._by_seq) != num_steps:
            raise RuntimeError(f"{len(self._by_seq)} of {num_steps} batches were read while the run trained")
        return [self._by_seq[seq] for seq in sorted(self._by_seq)]

    def _sequences(self, payload: bytes | None, file: str) -> list[list[int]]:
        stored = bytes(payload) if payload else (self._storage / file).read_bytes()
        data = forward_backward.from_bytes(stored).data
        return [[*datum.tokens.tolist(), int(datum.target_tokens[-1])] for datum in data]
