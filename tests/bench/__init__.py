"""Benchmarks. ``python -m tests.bench`` prints one JSON line a figure; timing is never a test."""
