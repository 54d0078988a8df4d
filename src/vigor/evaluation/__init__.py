"""Evaluation: benchmarks, and the sandbox for generated code."""
