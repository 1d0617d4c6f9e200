"""Where in the order of its data a run begins."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("runs", "0016_pending_deletions")]

    operations = [
        migrations.AddField(
            model_name="recipe", name="data_step", field=models.PositiveIntegerField(default=0)
        ),
        migrations.AddField(
            model_name="recipe", name="data_row", field=models.PositiveBigIntegerField(default=0)
        ),
    ]
