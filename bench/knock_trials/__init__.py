"""Trials for bench/knocks.py: damaged files, faulty servers, and runs that are disturbed."""
