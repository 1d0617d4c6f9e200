"""The arrangements that are timed beside each other, each behind a `step` or a `sample`; no measuring here."""
