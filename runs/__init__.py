"""The web side: runs, datasets and checkpoints as rows, the SDK's API, REST and pages."""
