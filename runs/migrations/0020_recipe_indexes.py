"""The loop of runs without code finds by an index what is paused, what ended of late, and weights for samples."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("runs", "0019_run_checkpoints_by_size")]

    operations = [
        migrations.AddIndex(
            model_name="recipe",
            index=models.Index(condition=models.Q(("state", "paused")), fields=["run"], name="recipe_paused"),
        ),
        migrations.AddIndex(
            model_name="recipe",
            index=models.Index(
                condition=models.Q(("state__in", ["finished", "stopped", "discarded", "failed"])),
                fields=["ended_at"],
                name="recipe_ended",
            ),
        ),
        migrations.AddIndex(
            model_name="checkpoint",
            index=models.Index(
                condition=models.Q(("is_ephemeral", True)), fields=["run", "seq"], name="checkpoint_ephemeral"
            ),
        ),
    ]
