"""The mint client package, over both supported tinker versions."""
