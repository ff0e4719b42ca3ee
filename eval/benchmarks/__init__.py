"""Benchmarks: what speed and memory cost, beside peers in the same run."""
