"""An operation names the folder of weights that it reads; a fork says whether it goes on where its parent stood."""

from django.db import migrations, models
from django.db.models import Q

# What was asked for before. A load that a worker may have to do (again) still names its folder in its payload; what
# tells such requests apart is the path, no longer the folder.
_LOADS = r"""
UPDATE runs_operation o SET loads_from = body->>'directory', payload_digest = encode(sha256(
  convert_to(o.kind, 'UTF8') || '\x00'::bytea
  || convert_to(format('{"path":%s,"optimizer":%s}', body->'path', body->'optimizer'), 'UTF8')), 'hex')
FROM (
  SELECT id, COALESCE(content->'load', content) AS body FROM (
    SELECT id, convert_from(payload, 'UTF8')::json AS content FROM runs_operation
    WHERE kind IN ('create_model', 'load_weights') AND payload IS NOT NULL
  ) AS stored
) AS loads
WHERE loads.id = o.id AND body->>'directory' <> ''
"""
_FORKS = """
UPDATE runs_trainingrun run SET continues_parent = recipe.first_step > 0 AND recipe.first_step = run.parent_step,
  parent_seq = (
    SELECT checkpoint.seq FROM runs_checkpoint checkpoint JOIN runs_trainingrun parent ON parent.id = checkpoint.run_id
    WHERE parent.id = run.parent_id AND checkpoint.step = run.parent_step
    AND run.parent_path = format('tinker://%s/%s/%s', parent.public_id, checkpoint.kind, checkpoint.name))
FROM runs_recipe recipe WHERE recipe.run_id = run.id AND run.parent_step IS NOT NULL
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
        migrations.AddField(
            model_name="trainingrun",
            name="parent_seq",
            field=models.BigIntegerField(null=True),
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
        migrations.RunSQL(_LOADS, migrations.RunSQL.noop),
        migrations.RunSQL(_FORKS, migrations.RunSQL.noop),
    ]
