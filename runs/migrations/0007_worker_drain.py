"""When an operator had a worker take nothing new and let go of what it holds."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0006_free_since"),
    ]

    operations = [
        migrations.AddField(
            model_name="worker",
            name="drain_asked_at",
            field=models.DateTimeField(null=True),
        ),
    ]
