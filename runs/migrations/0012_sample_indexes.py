"""Finds the oldest waiting samples of each owner, and the samples whose payload or answer is still kept."""

from django.db import migrations, models
from django.db.models import Q


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0011_worker_samplers"),
    ]

    operations = [
        migrations.AddIndex(
            model_name="operation",
            index=models.Index(
                fields=["owner", "id"],
                condition=Q(state="queued", sampling_session__isnull=False),
                name="sample_queued_of_owner",
            ),
        ),
        migrations.AddIndex(
            model_name="operation",
            index=models.Index(
                fields=["sampling_session"],
                condition=Q(sampling_session__isnull=False)
                & ~Q(state="queued")
                & (Q(payload__isnull=False) | ~Q(payload_file="") | Q(result__isnull=False)),
                name="sample_kept",
            ),
        ),
    ]
