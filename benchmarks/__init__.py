"""Benchmarks: every number in the README names the one that made it."""
