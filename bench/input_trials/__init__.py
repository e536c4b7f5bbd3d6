"""Generators of real and damaged inputs for bench/inputs.py, each with its own oracle."""
