"""Tries to sign in, counted for all web processes together."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0008_run_held_up"),
    ]

    operations = [
        migrations.CreateModel(
            name="SignInTries",
            fields=[
                ("key", models.CharField(max_length=64, primary_key=True, serialize=False)),
                ("num_tries", models.PositiveIntegerField()),
                ("until", models.DateTimeField()),
            ],
        ),
    ]
