"""What keeps a run from going on for now, in words, and when somebody last met it."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0007_worker_drain"),
    ]

    operations = [
        migrations.AddField(
            model_name="trainingrun",
            name="held_up",
            field=models.TextField(blank=True, db_default=""),
        ),
        migrations.AddField(
            model_name="trainingrun",
            name="held_up_at",
            field=models.DateTimeField(null=True),
        ),
    ]
