"""An operation names the folder of weights that it reads; a fork says whether it goes on where its parent stood."""

from django.db import migrations, models
from django.db.models import Q

# What was asked for before: a load that a worker may have to do (again) still names its folder in its payload.
_FOLDERS = """
UPDATE runs_operation o SET loads_from = COALESCE(body->>'directory', body->'load'->>'directory', '')
FROM (
  SELECT id, convert_from(payload, 'UTF8')::json AS body FROM runs_operation
  WHERE kind IN ('create_model', 'load_weights') AND state <> 'failed' AND payload IS NOT NULL
) AS loads
WHERE loads.id = o.id
"""
_CONTINUED = """
UPDATE runs_trainingrun run SET continues_parent = true FROM runs_recipe recipe
WHERE recipe.run_id = run.id AND run.parent_step > 0 AND recipe.first_step = run.parent_step
"""


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0013_prompts_by_digest"),
    ]

    operations = [
        migrations.AddField(
            model_name="operation",
            name="loads_from",
            field=models.CharField(blank=True, db_default="", max_length=200),
        ),
        migrations.AddField(
            model_name="trainingrun",
            name="continues_parent",
            field=models.BooleanField(db_default=False, default=False),
        ),
        migrations.AddIndex(
            model_name="operation",
            index=models.Index(
                condition=~Q(loads_from=""),
                fields=["loads_from"],
                name="operation_loads_from",
                opclasses=["varchar_pattern_ops"],
            ),
        ),
        migrations.RunSQL(_FOLDERS, migrations.RunSQL.noop),
        migrations.RunSQL(_CONTINUED, migrations.RunSQL.noop),
    ]
