"""Benchmarks by lm-evaluation-harness, asked of a model in any placement that holds it in these processes."""
