"""The dtype of a base model's weights and why it was chosen, for the page of workers."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0004_flat_catalogue"),
    ]

    operations = [
        migrations.AddField(
            model_name="basemodel",
            name="precision",
            field=models.CharField(blank=True, db_default="", max_length=300),
        ),
    ]
