"""Server-side training loops and what they need: rows as tokens, batches, schedules. Nothing here imports torch."""
