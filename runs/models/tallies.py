"""How many runs and checkpoints each person has, kept up by the database itself so that no page counts rows."""

from __future__ import annotations

from django.db import models

from runs.models.accounts import User


class CatalogTally(models.Model):
    """A change of a person's number of rows and of their bytes; the sum over a person's tallies is the present number.

    Triggers on the tables enter changes, which wait for nobody since each is a row of its own; housekeeping
    adds them up. Ephemeral checkpoints are counted apart from those that people named.
    """

    class Kind(models.TextChoices):
        """What is counted."""

        RUNS = "runs"
        CHECKPOINTS = "checkpoints"
        EPHEMERAL = "ephemeral"

    owner = models.ForeignKey(User, on_delete=models.DO_NOTHING, db_constraint=False, related_name="+")
    kind = models.CharField(max_length=12, choices=Kind.choices)
    num = models.BigIntegerField()
    size_bytes = models.BigIntegerField()

    class Meta:
        indexes = [models.Index(fields=["owner", "kind"], name="tally_by_owner")]

    def __str__(self) -> str:
        return f"{self.num:+} {self.kind} of {self.owner_id}"
