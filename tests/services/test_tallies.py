from __future__ import annotations

import json
from typing import Any

from django.core.cache import cache
from django.db import connection

from runs.models import CatalogTally, Checkpoint, TrainingRun, User
from runs.rest.paging import rows_after
from runs.services import access, checkpoints, disk, run_rows, tallies, training_runs
from runs.services.tallies import Kind, Total
from tests.services import rows

NUM_ROWS = 20_000
# Rows that differ in their moments, so that lists have an order.
_FILL = """
INSERT INTO runs_checkpoint (owner_id, run_id, kind, name, is_ephemeral, directory, size_bytes, seq, step, is_public,
  user_metadata, created_at)
SELECT %s, %s, 'weights', 'filled-' || n, false, 'nowhere', 3, n, n, false, '{}', now() - n * interval '1 second'
FROM generate_series(1, %s) n
"""


def fill(run: TrainingRun, number: int = NUM_ROWS) -> None:
    with connection.cursor() as cursor:
        cursor.execute(_FILL, [run.owner_id, run.pk, number])
        cursor.execute("ANALYZE runs_checkpoint")


def touched_buffers(query: Any) -> int:
    """Return how many pages of the database a query reads."""
    plan = json.loads(query.explain(format="JSON", analyze=True, buffers=True))[0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def test_every_way_of_making_and_losing_rows_is_counted(alice: User, bob: User, run: TrainingRun) -> None:
    assert tallies.total_of(alice, Kind.RUNS) == Total(1, 0)
    assert tallies.total_of(bob, Kind.RUNS) == tallies.total_of(alice, Kind.CHECKPOINTS) == Total(0, 0)
    first, second = (rows.make_checkpoint(run, name) for name in ("one", "two"))
    assert tallies.total_of(alice, Kind.CHECKPOINTS) == Total(2, 200)
    Checkpoint.objects.filter(pk=first.pk).update(is_ephemeral=True, size_bytes=70)
    assert tallies.total_of(alice, Kind.CHECKPOINTS) == Total(1, 100)
    assert tallies.total_of(alice, Kind.EPHEMERAL) == Total(1, 70)
    checkpoints.delete(second)
    assert tallies.total_of(alice, Kind.CHECKPOINTS) == Total(0, 0)
    fill(run, 5)
    assert tallies.total_of(alice, Kind.CHECKPOINTS) == Total(5, 15)
    TrainingRun.objects.filter(pk=run.pk).delete()
    for kind in Kind:
        assert tallies.total_of(alice, kind) == Total(0, 0)


def test_adding_up_changes_no_number(alice: User, run: TrainingRun) -> None:
    before = tallies.checkpoint_bytes()
    for name in ("one", "two", "three"):
        rows.make_checkpoint(run, name)
    tallies.add_up()
    assert CatalogTally.objects.filter(owner=alice, kind=Kind.CHECKPOINTS).count() == 1
    assert tallies.total_of(alice, Kind.CHECKPOINTS) == Total(3, 300)
    assert tallies.checkpoint_bytes() == before + 300
    Checkpoint.objects.filter(run=run).delete()
    tallies.add_up()
    assert not CatalogTally.objects.filter(owner=alice, kind=Kind.CHECKPOINTS).exists()


def test_a_page_of_checkpoints_reads_as_little_at_the_end_as_at_the_beginning(
    alice: User, run: TrainingRun
) -> None:
    fill(run)
    listed = access.checkpoints_of(alice)
    deep = Checkpoint.objects.get(run=run, name=f"filled-{NUM_ROWS // 2}")
    for column in ("created_at", "name", "step", "size_bytes"):
        for sign, comparison in (("-", "lt"), ("", "gt")):
            ordered = listed.order_by(f"{sign}{column}", f"{sign}pk")
            behind = rows_after(ordered, column, getattr(deep, column), deep.pk, comparison=comparison)
            assert touched_buffers(ordered[:50]) < 300, column
            if column != "size_bytes":  # all are equal: the rows before the position are passed over
                assert touched_buffers(behind[:50]) < 300, column
    assert touched_buffers(listed.filter(kind="sampler_weights")[:50]) < 300


def test_looking_for_what_expires_does_not_read_what_does_not(alice: User, run: TrainingRun) -> None:
    fill(run)
    assert touched_buffers(Checkpoint.objects.filter(expires_at__lte="2000-01-01T00:00Z")) < 20


def test_the_start_page_reads_runs_in_the_order_of_an_index(alice: User) -> None:
    plan = run_rows.by_activity(alice)[:51].explain()
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL enable_seqscan = off")
        cursor.execute("SET LOCAL enable_bitmapscan = off")
        plan = run_rows.by_activity(alice)[:51].explain()
    assert "run_by_activity" in plan
    assert "Sort Key" not in plan


def test_the_last_request_is_that_of_the_last_operation(run: TrainingRun) -> None:
    first = run.operations.get()
    assert training_runs.latest_of([run])[run.pk].asked_at == first.created_at
    run.operations.all().delete()
    assert training_runs.latest_of([run])[run.pk].asked_at == run.created_at


def test_the_disk_meter_knows_what_checkpoints_take(run: TrainingRun) -> None:
    cache.clear()
    parts = {part.kind: part.size_bytes for part in disk.usage().parts}
    cache.clear()
    rows.make_checkpoint(run, "one")
    after = {part.kind: part.size_bytes for part in disk.usage().parts}
    assert after["checkpoints"] == parts["checkpoints"] + 100
