"""Migrations that change rows, on rows as the version before wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection
from django.db.migrations import AddField, DeleteModel, RemoveField, RenameField, RenameModel
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.loader import MigrationLoader
from django.db.models import NOT_PROVIDED

from runs.models import Checkpoint, Operation, Recipe, TrainingRun, User
from runs.services import loads, operations, sampling
from tests.services import rows

FIRST_VERSION = "0003"
BEFORE_LOADS = ("runs", "0013_prompts_by_digest")


@pytest.fixture
def newest(transactional_db: None) -> Iterator[None]:
    """Bring the tables back to the newest version afterwards, whatever happens."""
    yield
    migrate()


def migrate(target: tuple[str, str] | None = None) -> None:
    """Bring the tables to a version, or to the newest."""
    executor = MigrationExecutor(connection)
    executor.migrate([target] if target else executor.loader.graph.leaf_nodes())


def test_the_version_before_can_write_to_the_new_tables() -> None:
    migrations = MigrationLoader(None).disk_migrations
    later = [one for (app, name), one in migrations.items() if app == "runs" and name > FIRST_VERSION]
    operations = [operation for migration in later for operation in migration.operations]
    assert not [
        one for one in operations if isinstance(one, DeleteModel | RemoveField | RenameField | RenameModel)
    ]
    added = [one for one in operations if isinstance(one, AddField)]
    assert added
    for one in added:
        field = one.field
        is_left_out = field.null or field.many_to_many or field.db_default is not NOT_PROVIDED
        assert is_left_out, f"{one.model_name}.{one.name} has to have a default in the database"


def test_loads_and_forks_of_before_are_known(newest: None) -> None:
    alice: User = rows.make_user("alice")
    parent = rows.make_run(alice)
    checkpoint = rows.make_checkpoint(parent)
    Checkpoint.objects.filter(pk=checkpoint.pk).update(step=7)
    fork, bare = rows.make_fork(checkpoint, alice), rows.make_run(alice)
    rows.make_recipe(fork, state="running")
    Recipe.objects.filter(run=fork).update(first_step=7)
    path = sampling.path_of(checkpoint)
    load = loads.submission(
        Operation.Kind.LOAD_WEIGHTS, seq=1, path=path, with_optimizer=False, directory=checkpoint.directory
    )
    pk = operations.submit(bare, load)
    expected = facts()
    Operation.objects.filter(loads_from=checkpoint.directory).update(payload_digest="of before")
    TrainingRun.objects.update(parent_step=None)
    TrainingRun.objects.filter(pk=fork.pk).update(parent_step=7)

    migrate(BEFORE_LOADS)
    migrate()

    assert facts() == expected
    assert Operation.objects.filter(loads_from=checkpoint.directory).count() == 2
    assert operations.submit(bare, load) == pk
    fork.refresh_from_db()
    assert (fork.continues_parent, fork.parent_seq) == (True, checkpoint.seq)
    assert not TrainingRun.objects.exclude(pk=fork.pk).filter(continues_parent=True).exists()


def facts() -> list[tuple[Any, ...]]:
    """Return what every operation is known by, and what it reads."""
    found = Operation.objects.order_by("pk").values_list("pk", "payload_digest", "loads_from", "payload")
    return [(*own, json.loads(bytes(payload or b""))) for *own, payload in found]
