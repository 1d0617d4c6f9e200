"""A GPU worker without a GPU: claims runs and commits answers through the services, as the real one does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runs.models import Operation, TrainingRun
from runs.services import claims, commits, workers
from runs.services.claims import HeldRun
from runs.services.commits import AppliedOperation, NewCheckpoint, Result, RunCommit

DONE = Result(body=b"{}")


def applied(
    operation_pk: int | None,
    seq: int,
    *,
    result: Result = DONE,
    metrics: Mapping[str, float] | None = None,
    checkpoint: NewCheckpoint | None = None,
) -> AppliedOperation:
    """Describe one applied operation."""
    return AppliedOperation(
        pk=operation_pk, seq=seq, step=seq, result=result, metrics=metrics or {}, checkpoint=checkpoint
    )


def commit_of(
    held: HeldRun,
    operations: Sequence[AppliedOperation],
    *,
    from_seq: int | None = None,
    loss: float | None = None,
) -> RunCommit:
    """Describe what a cycle did to a held run."""
    return RunCommit(
        run_pk=held.pk,
        owner_id=held.owner_id,
        public_id=held.public_id,
        base_model=held.base_model,
        session_public_id=held.session_public_id,
        fence=held.fence,
        from_seq=held.applied_seq if from_seq is None else from_seq,
        operations=operations,
        step=operations[-1].seq,
        num_tokens=10,
        loss=loss,
    )


class HandWorker:
    """One registered worker and the runs it holds."""

    def __init__(self) -> None:
        self.row = workers.register(device="cpu", dtype="float32")
        self.held: dict[int, HeldRun] = {}

    def release(self, run: TrainingRun) -> None:
        """Set a run free."""
        self.held.pop(run.pk, None)
        run.refresh_from_db(fields=["fence"])
        claims.release_run(run.pk, self.row, fence=run.fence)

    def hold(self, run: TrainingRun) -> HeldRun:
        """Claim what is free and return the run, which must be among it or held already."""
        while run.pk not in self.held:
            found = claims.claim_runs(self.row, [run.base_model], held=list(self.held))
            assert found, f"run {run} is not free"
            self.held |= {held.pk: held for held in found}
        return self.held[run.pk]

    def finish(
        self, operation_pk: int, result: Result = DONE, *, checkpoint: NewCheckpoint | None = None
    ) -> None:
        """Commit everything of the operation's run up to it; only the operation itself has the result."""
        operation = Operation.objects.select_related("run").get(pk=operation_pk)
        assert operation.run is not None
        held = self.hold(operation.run)
        run = TrainingRun.objects.get(pk=held.pk)
        before = Operation.objects.filter(run=run, seq__gt=run.applied_seq, seq__lt=operation.seq).order_by(
            "seq"
        )
        cycle = [applied(pk, seq) for pk, seq in before.values_list("pk", "seq")]
        cycle.append(applied(operation_pk, operation.seq, result=result, checkpoint=checkpoint))
        assert commits.commit_all([commit_of(held, cycle, from_seq=run.applied_seq)]) == [True]
