"""Trials for bench/knocks.py: damaged files and faulty servers."""
