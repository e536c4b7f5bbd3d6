"""Generators of real and damaged inputs for bench/inputs.py, each with an oracle of its own."""
