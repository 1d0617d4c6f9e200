"""When a run was last set free: who has room waits less for it than who has not."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0005_base_model_precision"),
    ]

    operations = [
        migrations.AddField(
            model_name="trainingrun",
            name="free_since",
            field=models.DateTimeField(null=True),
        ),
    ]
