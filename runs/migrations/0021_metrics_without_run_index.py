"""Both other indexes of values begin with the run; its own cost room and led the planner through values of other names."""

import django.db.models.deletion
from django.db import migrations, models

# As Django named it. To alter the field would check every value's run again meanwhile.
DROP = 'DROP INDEX IF EXISTS "runs_metric_run_id_869594ad"'
CREATE = 'CREATE INDEX IF NOT EXISTS "runs_metric_run_id_869594ad" ON "runs_metric" ("run_id")'


class Migration(migrations.Migration):
    dependencies = [("runs", "0020_recipe_indexes")]

    operations = [
        migrations.SeparateDatabaseAndState(
            database_operations=[migrations.RunSQL(DROP, reverse_sql=CREATE)],
            state_operations=[
                migrations.AlterField(
                    model_name="metric",
                    name="run",
                    field=models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="metrics",
                        to="runs.trainingrun",
                    ),
                )
            ],
        ),
    ]
