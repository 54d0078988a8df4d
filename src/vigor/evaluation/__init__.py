"""Evaluation: benchmarks on lm-evaluation-harness, and the sandbox for generated code."""
