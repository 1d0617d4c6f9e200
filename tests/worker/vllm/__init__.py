"""Samples by vLLM, captured and real."""
