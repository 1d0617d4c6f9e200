"""The GPU worker: claims operations, runs them through the engine, commits the results."""
