"""Who draws a worker's samples, in words, for each base model with a server for that."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0010_checkpoint_owed"),
    ]

    operations = [
        migrations.AddField(
            model_name="worker",
            name="samplers",
            field=models.JSONField(db_default={}, default=dict),
        ),
    ]
