"""Trials for bench/knocks.py: damaged files, faulty servers, kills, signals, full disks."""
