"""Measures mintweb beside plain transformers and PEFT, in one run; see docs/benchmarks.md. Not part of the product."""
