"""A fixed sample is one of a prompt's digest: an index cannot hold a long prompt itself."""

from django.db import migrations, models
from django.db.models.functions import MD5


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0012_sample_indexes"),
    ]

    operations = [
        migrations.AddConstraint(
            model_name="fixedsample",
            constraint=models.UniqueConstraint(
                "run", "step", MD5("prompt"), nulls_distinct=False, name="fixed_sample_of_prompt"
            ),
        ),
        migrations.RemoveConstraint(
            model_name="fixedsample",
            name="fixed_sample_once",
        ),
    ]
