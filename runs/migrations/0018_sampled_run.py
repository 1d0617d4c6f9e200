"""Which run a sample is drawn for, so that its samples are found without all that it ever had."""

from django.db import migrations, models
from django.db.models import Q


class Migration(migrations.Migration):
    dependencies = [("runs", "0017_data_starts")]

    operations = [
        migrations.AddField(
            model_name="operation",
            name="sampled_run_pk",
            field=models.BigIntegerField(null=True),
        ),
        migrations.AddIndex(
            model_name="operation",
            index=models.Index(
                fields=["sampled_run_pk", "finished_at"],
                condition=Q(sampled_run_pk__isnull=False),
                name="sample_of_run",
            ),
        ),
    ]
