"""Benchmarks. Each writes bench/results/NAME.json."""
