"""Many runs fed through the services of an instance's database, and what they ended with.

Imported once Django is set up for that instance.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from django.core.files.storage import default_storage
from django.db.models import Min

from runs.models import Checkpoint, Operation, RunEvent, Snapshot, TrainingRun
from runs.schemas import forward_backward, requests
from runs.schemas.data import DatumArrays
from runs.schemas.forward_backward import ForwardBackwardPayload
from runs.services import accounts, operations, sessions, training_runs
from runs.services.operations import Submission
from runs.services.training_runs import Lora

MODEL: Final = "mintweb/tiny"
_TIMEOUT_S: Final = 3600
_NUM_TOKENS: Final = 32


class Fleet:
    """Runs of rank 1 with seeds 0, 1, 2, ...; what each trains on depends on its seed and the round."""

    def __init__(self, num_runs: int) -> None:
        session = sessions.create_session(accounts.ensure_admin())
        self.runs: list[TrainingRun] = []
        creations = []
        for seed in range(num_runs):
            run, creation = training_runs.create_run(
                session, model_seq_id=seed, base_model=MODEL, lora=Lora(rank=1, seed=seed)
            )
            self.runs.append(run)
            creations.append(creation)
        self._seqs = [0] * num_runs
        wait(creations)

    def train(self, chosen: Sequence[int], *, round_number: int) -> list[int]:
        """Submit a forward_backward and an optim_step of each chosen run, in this order."""
        return [number for seed in chosen for number in self._round(seed, round_number)]

    def save(self, chosen: Sequence[int], name: str = "end") -> None:
        """Save the weights and moments of the chosen runs."""
        wait([self._save(seed, name) for seed in chosen])

    def digests(self, seed: int) -> dict[str, str]:
        """Return the SHA-256 of a run's saved weights and of its optimizer's state."""
        directory = Checkpoint.objects.get(run=self.runs[seed], name="end").directory
        state = json.loads((Path(default_storage.path(directory)) / "state.json").read_text())
        files: dict[str, str] = state["files"]
        return files

    def _round(self, seed: int, round_number: int) -> list[int]:
        tokens = np.array(
            random.Random(seed * 1000 + round_number).choices(range(300), k=_NUM_TOKENS + 1), dtype=np.int64
        )
        weights = np.ones(_NUM_TOKENS, dtype=np.float32)
        datum = DatumArrays(tokens=tokens[:-1], target_tokens=tokens[1:], inputs={"weights": weights})
        payload = ForwardBackwardPayload(
            model_id=self.runs[seed].public_id,
            seq_id=self._next_seq(seed),
            data=(datum,),
            loss_fn="cross_entropy",
            loss_config={},
            forward_only=False,
        )
        gradient = self._submit(
            seed, Operation.Kind.FORWARD_BACKWARD, payload.seq_id, forward_backward.to_bytes(payload)
        )
        step = {"seq_id": self._next_seq(seed), "adam_params": {"learning_rate": 1e-3}}
        request = requests.OptimStep.model_validate({"model_id": self.runs[seed].public_id, **step})
        return [
            gradient,
            self._submit(seed, Operation.Kind.OPTIM_STEP, request.seq_id, requests.canonical_json(request)),
        ]

    def _save(self, seed: int, name: str) -> int:
        body = {"model_id": self.runs[seed].public_id, "seq_id": self._next_seq(seed), "path": name}
        request = requests.SaveWeights.model_validate(body)
        return self._submit(
            seed, Operation.Kind.SAVE_WEIGHTS, request.seq_id, requests.canonical_json(request)
        )

    def _next_seq(self, seed: int) -> int:
        self._seqs[seed] += 1
        return self._seqs[seed]

    def _submit(self, seed: int, kind: str, seq: int, payload: bytes) -> int:
        num_tokens = _NUM_TOKENS if kind == Operation.Kind.FORWARD_BACKWARD else 0
        return operations.submit(
            self.runs[seed], Submission(kind=kind, seq=seq, payload=payload, num_tokens=num_tokens)
        )


def wait(numbers: Sequence[int]) -> None:
    """Return once all operations have their answers; none may have failed."""
    deadline = time.monotonic() + _TIMEOUT_S
    mine = Operation.objects.filter(pk__gte=min(numbers), pk__lte=max(numbers))
    while mine.filter(state=Operation.State.QUEUED).exists():
        if time.monotonic() > deadline:
            raise RuntimeError("the operations did not come to an end")
        time.sleep(0.005)
    failed = mine.filter(state=Operation.State.FAILED).first()
    if failed is not None:
        raise RuntimeError(f"operation {failed.pk} failed: {failed.error}")


def traces() -> dict[str, Any]:
    """Return what the runs left: recovery events (there should be none), snapshots kept, the oldest open operation."""
    return {
        "recoveries": RunEvent.objects.filter(kind__in=["recovered", "restored", "diverged"]).count(),
        "snapshots": Snapshot.objects.count(),
        "waiting_since": Operation.objects.filter(state="queued").aggregate(at=Min("created_at"))["at"],
    }
