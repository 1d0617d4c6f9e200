"""The compute engine: tensors, adapters and token ids; knows no HTTP, rows, Celery or settings."""
