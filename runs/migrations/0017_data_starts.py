"""Where in the order of its data a run begins, and what decides which rows are held out."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("runs", "0016_pending_deletions")]

    operations = [
        migrations.AddField(
            model_name="recipe",
            name="data_step",
            field=models.PositiveIntegerField(db_default=0, default=0),
        ),
        migrations.AddField(
            model_name="recipe",
            name="data_row",
            field=models.PositiveBigIntegerField(db_default=0, default=0),
        ),
        migrations.AddField(
            model_name="recipe",
            name="held_out_by",
            field=models.CharField(
                choices=[("seed", "Seed"), ("content", "Content")],
                db_default="seed",
                default="content",
                max_length=10,
            ),
        ),
    ]
