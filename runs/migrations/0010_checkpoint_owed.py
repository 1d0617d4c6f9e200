"""Finds the checkpoints whose save was answered and whose file is not written yet: there are few at any time."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0009_sign_in_tries"),
    ]

    operations = [
        migrations.AddIndex(
            model_name="checkpoint",
            index=models.Index(
                fields=["run"],
                condition=models.Q(is_ephemeral=True, size_bytes=0),
                name="checkpoint_owed",
            ),
        ),
    ]
