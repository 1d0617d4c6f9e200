"""The checkpoints of a run by their size, so that its list reads an index in each of its orders."""

from django.db import migrations, models
from django.db.models import Q


class Migration(migrations.Migration):
    dependencies = [("runs", "0018_sampled_run")]

    operations = [
        migrations.AddIndex(
            model_name="checkpoint",
            index=models.Index(
                fields=["run", "size_bytes", "id"],
                condition=Q(is_ephemeral=False),
                name="checkpoint_of_run_by_size",
            ),
        ),
    ]
