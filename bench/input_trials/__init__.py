"""Generators of valid and damaged inputs for bench/inputs.py, each with its own oracle."""
