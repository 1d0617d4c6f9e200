"""Lists that read an index in its order, and numbers of rows that the database keeps up itself."""

from django.conf import settings
from django.db import migrations, models
from django.db.models import F, OrderBy, Q
from django.db.models.functions import Coalesce

_NAMED = Q(("is_ephemeral", False))
_CHECKPOINT_KIND = "CASE WHEN is_ephemeral THEN 'ephemeral' ELSE 'checkpoints' END"


def _tally(table: str, kind: str, size_bytes: str, *, is_update_counted: bool) -> tuple[str, str]:
    """Return SQL that counts a table's rows from now on, with those that are there, and SQL that undoes it."""
    create, drop = [], []
    for name, sign in (("added", "+"), ("removed", "-")):
        create.append(
            f"""
            CREATE FUNCTION {table}_{name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
              INSERT INTO runs_catalogtally (owner_id, kind, num, size_bytes)
              SELECT owner_id, {kind}, {sign}count(*), {sign}{size_bytes} FROM {name} GROUP BY 1, 2;
              RETURN NULL;
            END $$;
            """
        )
        drop.append(f"DROP FUNCTION {table}_{name}() CASCADE;")
    events = [("INSERT", "added"), ("DELETE", "removed")]
    events += [("UPDATE", "added"), ("UPDATE", "removed")] if is_update_counted else []
    for event, name in events:
        rows = "NEW" if name == "added" else "OLD"
        create.append(
            f"""
            CREATE TRIGGER {table}_{event.lower()}_{name} AFTER {event} ON {table}
            REFERENCING {rows} TABLE AS {name} FOR EACH STATEMENT EXECUTE FUNCTION {table}_{name}();
            """
        )
    create.append(
        f"""
        INSERT INTO runs_catalogtally (owner_id, kind, num, size_bytes)
        SELECT owner_id, {kind}, count(*), {size_bytes} FROM {table} GROUP BY 1, 2;
        """
    )
    return "".join(create), "".join(drop)


class Migration(migrations.Migration):
    dependencies = [("runs", "0003_signs_of_life")]

    operations = [
        migrations.CreateModel(
            name="CatalogTally",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "kind",
                    models.CharField(
                        choices=[
                            ("runs", "Runs"),
                            ("checkpoints", "Checkpoints"),
                            ("ephemeral", "Ephemeral"),
                        ],
                        max_length=12,
                    ),
                ),
                ("num", models.BigIntegerField()),
                ("size_bytes", models.BigIntegerField()),
                (
                    "owner",
                    models.ForeignKey(
                        db_constraint=False,
                        on_delete=models.DO_NOTHING,
                        related_name="+",
                        to=settings.AUTH_USER_MODEL,
                    ),
                ),
            ],
            options={"indexes": [models.Index(fields=["owner", "kind"], name="tally_by_owner")]},
        ),
        *(
            migrations.AddIndex("checkpoint", models.Index(fields=fields, condition=_NAMED, name=name))
            for name, fields in (
                ("checkpoint_by_age", ["owner", "-created_at", "-id"]),
                ("checkpoint_by_name", ["owner", "name", "id"]),
                ("checkpoint_by_step", ["owner", "step", "id"]),
                ("checkpoint_by_size", ["owner", "size_bytes", "id"]),
                ("checkpoint_by_kind", ["owner", "kind", "-created_at", "-id"]),
            )
        ),
        migrations.AddIndex(
            "checkpoint", models.Index(fields=["run", "-created_at", "-id"], name="checkpoint_of_run")
        ),
        migrations.AddIndex(
            "checkpoint",
            models.Index(
                fields=["expires_at"], condition=Q(("expires_at__isnull", False)), name="checkpoint_expiring"
            ),
        ),
        migrations.AddIndex(
            "trainingrun",
            models.Index(
                F("owner"),
                OrderBy(Coalesce("last_applied_at", "created_at"), descending=True),
                OrderBy(F("id"), descending=True),
                name="run_by_activity",
            ),
        ),
        migrations.AddIndex(
            "runevent",
            models.Index(fields=["run"], condition=Q(("kind", "diverged")), name="run_diverged"),
        ),
        migrations.RunSQL(*_tally("runs_trainingrun", "'runs'", "0", is_update_counted=False)),
        migrations.RunSQL(
            *_tally("runs_checkpoint", _CHECKPOINT_KIND, "sum(size_bytes)", is_update_counted=True)
        ),
    ]
