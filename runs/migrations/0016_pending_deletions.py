"""Stored folders that are to go, until they are gone."""

import django.db.models.functions.datetime
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0015_run_rests"),
    ]

    operations = [
        migrations.CreateModel(
            name="PendingDeletion",
            fields=[
                (
                    "id",
                    models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID"),
                ),
                ("path", models.CharField(max_length=200)),
                ("tries", models.PositiveIntegerField(db_default=0, default=0)),
                ("due_at", models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ("created_at", models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
            ],
            options={
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(
                            path__regex=r"^((checkpoints|snapshots)/[0-9]+(/[^/.][^/]*)?|datasets/[^/.][^/]*)$"
                        ),
                        name="pending_deletion_inside_storage",
                    )
                ],
            },
        ),
    ]
