"""Each protection, the small change that takes it away, and the tests that must fail then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One protection without which some test of `red` fails; `find` is in the file exactly once."""

    name: str
    protects_from: str
    file: str
    find: str
    replace: str
    red: tuple[str, ...]


_CLAIMS = "tests/services/test_claims.py::"
_COMMITS = "tests/services/test_commits.py::"
_OPERATIONS = "tests/services/test_operations.py::"
_WORKERS = "tests/services/test_workers.py::"
_RECOVERY = "tests/worker/test_recovery.py::"
_WORKER = "tests/worker/test_operations.py::"
_EARLY = "tests/services/test_early_answers.py::"
_RESTORES = "tests/services/test_restores.py::"

# The names of those that need no torch and take seconds only.
FAST: Final = (
    "fence",
    "compare-and-swap",
    "new fence for each owner",
    "dedupe",
    "first answer stands",
    "attempts counter",
    "advisory lock",
    "on_commit kick",
)
MUTATIONS: Final = (
    Mutation(
        name="fence",
        protects_from="a worker that lost a run commits to it",
        file="runs/services/commits.py",
        find="WHERE r.id = new.id AND r.fence = new.fence AND r.applied_seq = new.from_seq",
        replace="WHERE r.id = new.id AND r.applied_seq = new.from_seq",
        red=(f"{_COMMITS}test_a_stale_fence_writes_nothing",),
    ),
    Mutation(
        name="compare-and-swap",
        protects_from="an operation is applied twice, or passed over",
        file="runs/services/commits.py",
        find="AND r.fence = new.fence AND r.applied_seq = new.from_seq",
        replace="AND r.fence = new.fence",
        red=(
            f"{_COMMITS}test_a_wrong_from_seq_writes_nothing",
            f"{_COMMITS}test_a_commit_repeated_after_a_lost_confirmation_doubles_nothing",
        ),
    ),
    Mutation(
        name="new fence for each owner",
        protects_from="the former owner's fence is still good",
        file="runs/services/claims.py",
        find="SET fence = taken.fence + 1, worker_id = %s,",
        replace="SET fence = taken.fence, worker_id = %s,",
        red=(f"{_CLAIMS}test_each_new_claim_raises_the_fence_again",),
    ),
    Mutation(
        name="one owner at a time",
        protects_from="two workers claim the same run",
        file="runs/services/claims.py",
        find="WHERE (run.worker_id IS NULL OR w.stopped_at IS NOT NULL\n         OR (run.worker_id = %s",
        replace="WHERE (true OR w.stopped_at IS NOT NULL\n         OR (run.worker_id = %s",
        red=(f"{_CLAIMS}test_racing_workers_claim_each_run_once",),
    ),
    Mutation(
        name="the buried claim nothing",
        protects_from="a zombie takes runs that nobody will ever take from it",
        file="runs/services/claims.py",
        find="WHERE me.id = %s AND me.stopped_at IS NULL AND me.drain_asked_at IS NULL)",
        replace="WHERE me.id = %s AND me.drain_asked_at IS NULL)",
        red=(f"{_CLAIMS}test_a_buried_worker_claims_nothing",),
    ),
    Mutation(
        name="the drained claim nothing",
        protects_from="a worker that is being taken out of service takes runs back that it has just let go",
        file="runs/services/claims.py",
        find="WHERE me.id = %s AND me.stopped_at IS NULL AND me.drain_asked_at IS NULL)",
        replace="WHERE me.id = %s AND me.stopped_at IS NULL)",
        red=("tests/services/test_placement.py::test_a_drained_worker_takes_nothing_and_counts_for_nobody",),
    ),
    Mutation(
        name="an answered save is applied once more",
        protects_from="weights to sample from are gone with the worker that answered before it wrote them",
        file="runs/services/claims.py",
        find="            is_rejected=row[4] == Operation.State.FAILED,\n            is_answered",
        replace="            is_rejected=row[4] != Operation.State.QUEUED,\n            is_answered",
        red=(f"{_EARLY}test_a_successor_applies_it_once_more_and_owes_the_file",),
    ),
    Mutation(
        name="runs that owe a file are claimed",
        protects_from="samples wait for ever for a file that nobody writes, because nothing of the run waits",
        file="runs/services/claims.py",
        find="                AND c.seq > run.applied_seq)",
        replace="                AND c.seq > run.applied_seq AND false)",
        red=(f"{_EARLY}test_a_successor_applies_it_once_more_and_owes_the_file",),
    ),
    Mutation(
        name="unwritten weights are sampled where they are",
        protects_from="another worker takes a sample, finds no file and fails it",
        file="runs/services/sample_claims.py",
        find="AND c.size_bytes = 0 AND NOT c.directory = ANY(%(unwritten)s::text[]))",
        replace="AND c.size_bytes = 0 AND %(unwritten)s::text[] IS NULL)",
        red=(f"{_EARLY}test_samples_go_where_the_weights_are_until_the_file_is_there",),
    ),
    Mutation(
        name="release under the own fence",
        protects_from="a late release frees a run that was claimed again",
        file="runs/services/claims.py",
        find="TrainingRun.objects.filter(pk=run_pk, worker=worker, fence=fence)",
        replace="TrainingRun.objects.filter(pk=run_pk, worker=worker)",
        red=(f"{_CLAIMS}test_a_late_release_does_not_free_a_run_that_was_claimed_again",),
    ),
    Mutation(
        name="lost runs are dropped",
        protects_from="a worker computes on for a run that is another's",
        file="gpuworker/committer.py",
        find='it is dropped here", commit.public_id)\n            run.seat.is_lost = True',
        replace='it is dropped here", commit.public_id)',
        red=(f"{_RECOVERY}test_a_run_that_another_worker_took_is_dropped_and_later_rebuilt",),
    ),
    Mutation(
        name="dedupe",
        protects_from="a request that is sent twice is done twice or refused",
        file="runs/services/operations.py",
        find="ON CONFLICT DO NOTHING RETURNING id",
        replace="RETURNING id",
        red=(f"{_OPERATIONS}test_a_retry_returns_the_first_row",),
    ),
    Mutation(
        name="one request for a seq",
        protects_from="another request under a seq that is taken is answered with the first one's result",
        file="runs/services/operations.py",
        find="if first.payload_digest == submission.digest:",
        replace="if first.payload_digest:",
        red=(f"{_OPERATIONS}test_another_request_under_the_same_seq_is_refused",),
    ),
    Mutation(
        name="first result stands",
        protects_from="an operation's answer changes after a client has read it",
        file="runs/services/commits.py",
        find="WHERE o.id = new.id AND o.state = 'queued'",
        replace="WHERE o.id = new.id",
        red=(f"{_COMMITS}test_a_finished_operation_never_changes_again",),
    ),
    Mutation(
        name="first answer stands",
        protects_from="a sample's answer changes after a client has read it",
        file="runs/services/commits.py",
        find="WHERE id = %s AND state = 'queued'\n",
        replace="WHERE id = %s\n",
        red=(f"{_COMMITS}test_the_first_answer_of_a_sample_stands",),
    ),
    Mutation(
        name="attempts counter",
        protects_from="an operation that ends its worker ends all of them, for ever",
        file="runs/services/claims.py",
        find="SET attempts = attempts + (worker_id IS DISTINCT FROM me.id)::int, worker_id = me.id,",
        replace="SET worker_id = me.id,",
        red=(f"{_CLAIMS}test_each_worker_that_takes_it_counts_an_attempt_and_notes_the_start",),
    ),
    Mutation(
        name="suspects are tried alone",
        protects_from="neighbours share the fate of an operation that ends its worker",
        file="gpuworker/scheduler.py",
        find="until_reachable(partial(claims.count_lone_attempt, operation.taken.pk))",
        replace="pass",
        red=(f"{_WORKER}test_an_operation_whose_workers_died_is_tried_alone_and_then_given_up",),
    ),
    Mutation(
        name="gap buffer",
        protects_from="a later operation is applied before an earlier one that is still on its way",
        file="gpuworker/intake.py",
        find="if operation.seq != seat.taken_seq + 1:",
        replace="if operation.seq <= seat.taken_seq:",
        red=(f"{_WORKER}test_a_missing_seq_is_waited_for_and_then_given_up",),
    ),
    Mutation(
        name="flush of states before their name",
        protects_from="a power cut leaves a checkpoint with holes under its final name",
        file="gpuworker/engine/checkpoints.py",
        find="    for path in scratch.iterdir():\n        _sync(path)\n    _sync(scratch)\n",
        replace="",
        red=("tests/engine/test_checkpoints.py::test_all_of_it_is_flushed_before_its_name_appears",),
    ),
    Mutation(
        name="flush of the name",
        protects_from="a power cut takes a checkpoint away that a row names",
        file="gpuworker/engine/checkpoints.py",
        find="        scratch.rename(directory)\n    _sync(directory.parent)\n",
        replace="        scratch.rename(directory)\n",
        red=("tests/engine/test_checkpoints.py::test_all_of_it_is_flushed_before_its_name_appears",),
    ),
    Mutation(
        name="flush of large requests",
        protects_from="a power cut takes a request away that was acknowledged",
        file="runs/services/blobs.py",
        find="            file.flush()\n            os.fsync(file.fileno())\n",
        replace="",
        red=("tests/services/test_flushes.py",),
    ),
    Mutation(
        name="snapshot hash",
        protects_from="a run goes on from weights that the disk has changed",
        file="gpuworker/engine/checkpoints.py",
        find="    if _digest(path) != digest:\n",
        replace="    if not digest:\n",
        red=(
            "tests/engine/test_checkpoints.py::test_it_refuses_damaged_directories",
            f"{_RECOVERY}test_a_damaged_snapshot_gives_way_to_the_one_before",
        ),
    ),
    Mutation(
        name="gradients in snapshots",
        protects_from="what was accumulated since the last step is lost in a take-over",
        file="gpuworker/residents.py",
        find="state = seat.engine.export_state(seat.adapter_id, optimizer=True, gradients=True)",
        replace="state = seat.engine.export_state(seat.adapter_id, optimizer=True, gradients=False)",
        red=(f"{_RECOVERY}test_what_was_accumulated_survives",),
    ),
    Mutation(
        name="snapshots under the fence",
        protects_from="a zombie's snapshot becomes one to start from",
        file="runs/services/commits.py",
        find="if not TrainingRun.objects.select_for_update().filter(pk=run_pk, fence=fence).exists():",
        replace="if not TrainingRun.objects.select_for_update().filter(pk=run_pk).exists():",
        red=(f"{_COMMITS}test_a_snapshot_of_a_former_owner_is_not_entered",),
    ),
    Mutation(
        name="replay compare",
        protects_from="a replay that gives other results goes unnoticed",
        file="gpuworker/restore.py",
        find="is_same = replayed == taken.result",
        replace="is_same = True",
        red=("tests/worker/test_divergence.py",),
    ),
    Mutation(
        name="on_commit kick",
        protects_from="a worker is called before there is anything to see, and not again",
        file="runs/events.py",
        find="    transaction.on_commit(_drain_doorbell.ring)\n",
        replace="    _drain_doorbell.ring()\n",
        red=(f"{_OPERATIONS}test_the_doorbell_rings_after_the_commit",),
    ),
    Mutation(
        name="advisory lock",
        protects_from="a killed worker's runs wait until its lease has run out",
        file="runs/services/workers.py",
        find="    if lock_was_free:\n        is_dead |=",
        replace="    if not is_dead:\n        is_dead |=",
        red=(f"{_WORKERS}test_a_closed_lock_connection_means_death_at_once",),
    ),
    Mutation(
        name="lease",
        protects_from="a frozen worker, whose connection lives, keeps its runs for ever",
        file="runs/services/workers.py",
        find="    is_dead = Q(lease_until__lte=Now())\n",
        replace="    is_dead = Q(pk=None)\n",
        red=(f"{_WORKERS}test_a_lease_that_ran_out_means_death_though_the_lock_is_held",),
    ),
    Mutation(
        name="lease tied to progress",
        protects_from="a worker whose device is stuck looks alive and keeps its runs",
        file="gpuworker/leases.py",
        find="            if self._is_stuck():\n",
        replace="            if self._stopping.is_set():\n",
        red=("tests/worker/test_hang.py::test_a_stuck_worker_is_ended_instead_of_renewed",),
    ),
    Mutation(
        name="the buried are told",
        protects_from="a zombie goes on as if it still had its runs",
        file="runs/services/workers.py",
        find='samplers = %s::jsonb WHERE id = %s AND stopped_at IS NULL",',
        replace='samplers = %s::jsonb WHERE id = %s",',
        red=(f"{_WORKERS}test_a_buried_worker_is_told_at_its_next_renewal",),
    ),
    Mutation(
        name="no wait for the frozen",
        protects_from="one worker frozen in a transaction stops all others",
        file="runs/services/workers.py",
        find="TrainingRun.objects.select_for_update(skip_locked=True).filter(worker=worker)",
        replace="TrainingRun.objects.filter(worker=worker)",
        red=(f"{_WORKERS}test_a_worker_frozen_in_a_commit_keeps_that_run_only",),
    ),
    Mutation(
        name="only dead folders are swept",
        protects_from="a checkpoint that is about to be entered is deleted",
        file="runs/services/state_folders.py",
        find="for name in orphans - _named(kind, run_pk) if _fence_of(name) < fence}",
        replace="for name in orphans - _named(kind, run_pk)}",
        red=("tests/services/test_state_folders.py::test_what_the_owner_may_yet_enter_stays",),
    ),
    Mutation(
        name="grace after a restart of the database",
        protects_from="workers find each other dead when it comes back",
        file="runs/services/workers.py",
        find="    if not _server_has_settled():\n        return []\n",
        replace="",
        red=(f"{_WORKERS}test_nobody_is_found_dead_just_after_the_server_came_up",),
    ),
    Mutation(
        name="steady witness",
        protects_from="a worker that was cut off finds all others dead when it is back",
        file="gpuworker/intake.py",
        find="                    if self._may_find_dead:\n",
        replace="                    if True:\n",
        red=(
            "tests/worker/test_intake.py::test_others_are_found_dead_only_while_the_database_is_heard_steadily",
        ),
    ),
    Mutation(
        name="rest of a run that ends its workers",
        protects_from="one run ends one worker after the other",
        file="runs/services/claims.py",
        find=" AND (run.rests_until IS NULL OR run.rests_until <= statement_timestamp())",
        replace="",
        red=(f"{_RESTORES}test_a_run_that_many_workers_died_over_rests_longer_each_time",),
    ),
    Mutation(
        name="put off after any error",
        protects_from="an error over one run's state ends the worker",
        file="gpuworker/residents.py",
        find="        except Exception as error:\n            if not is_out_of_memory(error):\n",
        replace="        except MemoryError as error:\n            if not is_out_of_memory(error):\n",
        red=(
            "tests/worker/test_put_off.py::test_an_error_that_nobody_expects_keeps_one_run_out_and_no_other",
        ),
    ),
    Mutation(
        name="mark of the storage",
        protects_from="a disk that is not mounted counts as one that lost everything",
        file="runs/services/blobs.py",
        find="        with away():\n            storage_mark.check()\n        raise\n",
        replace="        raise\n",
        red=("tests/services/test_storage_mark.py::test_without_a_mark_nothing_is_gone",),
    ),
)
