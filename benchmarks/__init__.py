"""Benchmarks of mvle: pytest-benchmark suites, and the peers that they are held against."""
