"""How many workers in a row were lost while they brought a run back, and until when it rests for that."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0014_weights_read"),
    ]

    operations = [
        migrations.AddField(
            model_name="trainingrun",
            name="restore_tries",
            field=models.PositiveIntegerField(db_default=0, default=0),
        ),
        migrations.AddField(
            model_name="trainingrun",
            name="rests_until",
            field=models.DateTimeField(null=True),
        ),
    ]
