"""Trials for bench/knocks.py: damaged files, faulty servers, and disturbed runs."""
